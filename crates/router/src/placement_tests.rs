use super::*;

const GIB: u64 = 1 << 30;
const FORCED: Rules = Rules { forced: true, first: None };

fn model(layers: usize) -> PlacedModel {
    PlacedModel {
        layer_bytes: vec![GIB; layers],
        embedding_bytes: GIB / 2,
        head_bytes: GIB / 2,
        kv_bytes_per_token: 4096,
        kv_tokens: 1 << 16,
        hidden_bytes: 16 << 10,
    }
}

/// A member whose step is flat up to 8 rows and linear from there.
fn member(memory_gib: u64, layer_ms: f64) -> Member {
    let points = |ms: f64| vec![(1, ms / 1e3), (8, ms / 1e3), (64, 6.0 * ms / 1e3)];
    Member { memory_bytes: memory_gib * GIB, layer_s: points(layer_ms), head_s: points(layer_ms / 2.0) }
}

fn links(members: usize, latency_ms: f64) -> Vec<Vec<Link>> {
    vec![vec![Link { latency_s: latency_ms / 1e3, bytes_per_s: 1e9 }; members]; members]
}

fn cuts(layers: usize, stages: usize) -> Vec<Vec<Range<usize>>> {
    fn go(
        from: usize,
        layers: usize,
        stages: usize,
        done: &[Range<usize>],
        all: &mut Vec<Vec<Range<usize>>>,
    ) {
        if stages == 1 {
            all.push([done, std::slice::from_ref(&(from..layers))].concat());
            return;
        }
        for end in from + 1..=layers - (stages - 1) {
            go(end, layers, stages - 1, &[done, std::slice::from_ref(&(from..end))].concat(), all);
        }
    }
    let mut all = Vec::new();
    go(0, layers, stages, &[], &mut all);
    all
}

fn orders(members: usize, length: usize) -> Vec<Vec<usize>> {
    if length == 0 {
        return vec![Vec::new()];
    }
    let longer = |order: Vec<usize>| {
        let next = (0..members).filter(|next| !order.contains(next)).collect::<Vec<_>>();
        next.into_iter().map(move |next| [order.as_slice(), &[next]].concat())
    };
    orders(members, length - 1).into_iter().flat_map(longer).collect()
}

/// The least cycle of all placements there are, of at least two stages.
fn least_cycle_s(model: &PlacedModel, members: &[Member], links: &[Vec<Link>], rows: u32) -> Option<f64> {
    let layers = model.layer_bytes.len();
    let mut least: Option<f64> = None;
    for micro_batches in 1..=(2 * members.len() as u32).min(rows) {
        let micro_rows = rows.div_ceil(micro_batches);
        for stages in 2..=members.len().min(layers) {
            for order in orders(members.len(), stages) {
                for cut in cuts(layers, stages) {
                    let (mut sum_s, mut slowest_s, mut fits) = (0.0, 0.0_f64, true);
                    for (index, range) in cut.iter().enumerate() {
                        let who = &members[order[index]];
                        let (mut bytes, mut stage_s) = (model.kv_bytes(range), 0.0);
                        bytes += model.layer_bytes[range.clone()].iter().sum::<u64>();
                        stage_s += seconds_at(&who.layer_s, micro_rows) * range.len() as f64;
                        let link = &links[order[index]][order[(index + 1) % stages]];
                        let mut sent = u64::from(micro_rows) * model.hidden_bytes;
                        if index == 0 {
                            bytes += model.embedding_bytes;
                        }
                        if index + 1 == stages {
                            bytes += model.head_bytes;
                            stage_s += seconds_at(&who.head_s, micro_rows);
                            sent = u64::from(micro_rows) * 4;
                        }
                        fits &= bytes <= who.memory_bytes;
                        slowest_s = slowest_s.max(stage_s);
                        sum_s += stage_s + link.latency_s + sent as f64 / link.bytes_per_s;
                    }
                    let cycle_s = (f64::from(micro_batches) * slowest_s).max(sum_s);
                    if fits && least.is_none_or(|least| cycle_s < least) {
                        least = Some(cycle_s);
                    }
                }
            }
        }
    }
    least
}

#[test]
fn the_best_of_all_placements_is_found() {
    for seed in 0..60 {
        let mut random = fastrand::Rng::with_seed(seed);
        let layers = random.usize(2..7);
        let count = random.usize(2..5);
        let mut model = model(layers);
        model.layer_bytes.iter_mut().for_each(|bytes| *bytes = random.u64(GIB / 2..2 * GIB));
        let members: Vec<Member> =
            (0..count).map(|_| member(random.u64(1..9), 0.2 + 3.0 * random.f64())).collect();
        let mut links = links(count, 0.0);
        for link in links.iter_mut().flatten() {
            *link = Link { latency_s: random.f64() * 4e-3, bytes_per_s: 1e7 + random.f64() * 1e9 };
        }
        let rows = random.u32(1..20);
        let goal = Goal::Throughput { rows };
        let found = place(&model, &members, &links, goal, FORCED);
        match (found, least_cycle_s(&model, &members, &links, rows)) {
            (Ok(plan), Some(least_s)) => {
                let off = (plan.cycle_s / least_s - 1.0).abs();
                assert!(off < 1e-6, "seed {seed}: {} instead of {least_s}: {plan:?}", plan.cycle_s);
                for stage in &plan.stages {
                    let bytes = stage.weight_bytes + stage.kv_bytes;
                    assert!(bytes <= members[stage.member].memory_bytes, "seed {seed}: {stage:?}");
                }
            }
            (Err(PlacementError::TooLarge { .. }), None) => {}
            other => panic!("seed {seed}: {other:?}"),
        }
    }
}

#[test]
fn equal_members_get_equal_parts_and_as_many_batches_as_fill_them() {
    let members = vec![member(64, 1.0); 4];
    let goal = Goal::Throughput { rows: 32 };
    let plan = place(&model(80), &members, &links(4, 0.3), goal, Rules::default()).expect("a plan");
    let layers: Vec<usize> = plan.stages.iter().map(|stage| stage.layers.len()).collect();
    assert!(layers.iter().all(|layers| (19..=21).contains(layers)), "{layers:?}");
    assert!(plan.micro_batches >= 4 && plan.bubble < 0.15, "{plan:?}");
}

#[test]
fn a_member_of_twice_the_speed_gets_twice_the_layers() {
    let members = [member(64, 2.0), member(64, 1.0)];
    let goal = Goal::Throughput { rows: 16 };
    let plan = place(&model(60), &members, &links(2, 0.1), goal, Rules::default()).expect("a plan");
    let of =
        |member: usize| plan.stages.iter().find(|stage| stage.member == member).expect("used").layers.len();
    assert!((of(1) as f64 / of(0) as f64 - 2.0).abs() < 0.2, "{plan:?}");
}

#[test]
fn for_latency_the_fastest_gets_as_much_as_it_holds() {
    let members = [member(100, 4.0), member(40, 1.0)];
    let plan = place(&model(60), &members, &links(2, 0.1), Goal::Latency, Rules::default()).expect("a plan");
    let fast = plan.stages.iter().find(|stage| stage.member == 1).expect("used");
    // 40 GiB: layers of 1.25 GiB with their KV, and the embedding or the head.
    assert_eq!((fast.layers.len(), plan.micro_batches), (31, 1), "{plan:?}");
}

#[test]
fn no_split_where_one_member_is_faster() {
    let members = [member(100, 1.0), member(100, 1.0)];
    let plan = |latency_ms, rows, forced| {
        place(
            &model(60),
            &members,
            &links(2, latency_ms),
            Goal::Throughput { rows },
            Rules { forced, first: None },
        )
    };
    let error = plan(5.0, 4, false).expect_err("slower");
    assert!(matches!(error, PlacementError::Slower { stages: 2, member: 0, .. }), "{error}");
    assert_eq!(plan(5.0, 4, true).expect("forced").stages.len(), 2);
    // With many rows two of them do more than one.
    assert!(plan(0.1, 64, false).is_ok());
}

#[test]
fn what_is_wrong_is_named() {
    let check = |model: &PlacedModel, members: &[Member], links: &[Vec<Link>], expected: &str| {
        let error =
            place(model, members, links, Goal::Latency, Rules::default()).expect_err(expected).to_string();
        assert_eq!(error, expected);
    };
    check(&model(4), &[], &links(0, 0.0), "0 members; a pipeline has from 1 to 8");
    check(&model(0), &[member(1, 1.0)], &links(1, 0.0), "0 layers; from 1 to 512 can be placed");
    let expected = "the model needs 6442450944 bytes with its KV; the members have 4294967296, too little or badly divided";
    check(&model(4), &[member(2, 1.0), member(2, 1.0)], &links(2, 0.0), expected);
    let mut unmeasured = member(2, 1.0);
    unmeasured.layer_s = vec![(1, f64::NAN)];
    check(&model(4), &[unmeasured], &links(1, 0.0), "member 0: layer_s is not a measurement");
    check(&model(4), &[member(9, 1.0)], &links(0, 0.0), "member 0: a link is not a measurement");
}

#[test]
fn six_members_are_placed() {
    let members: Vec<Member> = (1..=6).map(|index| member(32, 0.3 * f64::from(index))).collect();
    let plan = place(&model(80), &members, &links(6, 0.5), Goal::Throughput { rows: 32 }, Rules::default());
    let plan = plan.expect("a plan");
    assert!(plan.stages.len() > 3, "{plan:?}");
}

/// A head that is slow has the first layers all the same, and few of them.
#[test]
fn the_first_stage_may_be_given() {
    let members = [member(40, 1.0), member(40, 1.0), member(40, 4.0)];
    for first in 0..3 {
        let rules = Rules { first: Some(first), forced: true };
        let plan = place(&model(60), &members, &links(3, 0.1), Goal::Throughput { rows: 8 }, rules);
        let plan = plan.expect("a plan");
        assert_eq!(plan.stages[0].member, first, "{plan:?}");
    }
}
