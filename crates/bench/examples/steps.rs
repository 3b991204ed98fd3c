//! quick
use mlx::*;
fn main() {
    let settings = LoadSettings { model: std::env::args().nth(1).unwrap().into(), name: "m".into(), slots: 64, context_tokens: None, kv_bytes: Some(4<<30), dequantize: Dequantize::Auto, device: DeviceChoice::Auto };
    let t = std::time::Instant::now();
    let (mut model, _) = load(&settings, &mut |_, _| ()).unwrap();
    println!("load {:?}", t.elapsed());
    let sampled = std::env::args().nth(2).is_some();
    let sampling = if sampled { types::SamplingParams::try_from(types::SamplingDraft { top_p: 0.9, ..Default::default() }).unwrap() } else { types::SamplingParams::greedy() };
    for f in bench::engine_steps(model.as_mut(), &bench::EngineBenchSettings { batches: vec![1, 4, 8, 16], prompt_tokens: 128, new_tokens: 32, sampling }).unwrap() { println!("{f:?}"); }
}
