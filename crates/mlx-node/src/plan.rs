//! `mlx-node plan`: how pipelines are divided, or why they are not, as a running endpoint knows it from their members'
//! measurements.

use crate::{
    status::{list, milliseconds, number, text},
    table::{columns, compact},
};
use serde_json::Value;

/// The pipelines of a cluster, each as its head tells of it; of one that has no head yet, as any member does. With a name only
/// those of that model.
pub(crate) fn plans<'a>(cluster: &'a Value, model: Option<&str>) -> Vec<&'a Value> {
    let mut plans: Vec<&Value> = Vec::new();
    for node in list(&cluster["nodes"]) {
        let report = &node["pipeline"];
        if report.is_null() || model.is_some_and(|model| report["model"] != model) {
            continue;
        }
        match plans.iter_mut().find(|known| known["model"] == report["model"]) {
            Some(known) if report["head"] == node["id"] => *known = report,
            Some(_) => {}
            None => plans.push(report),
        }
    }
    plans
}

/// The same as text.
pub(crate) fn shown(cluster: &Value, model: Option<&str>) -> String {
    let plans = plans(cluster, model);
    if plans.is_empty() {
        if let Some(model) = model {
            let all: Vec<String> =
                self::plans(cluster, None).iter().map(|plan| text(&plan["model"])).collect();
            let all = if all.is_empty() {
                "there is none".to_owned()
            } else {
                format!("there are: {}", all.join(", "))
            };
            return format!("no node tells of a pipeline of {model:?}; {all}\n");
        }
        return "no node tells of a pipeline: see [[pipeline]] in the configuration file\n".to_owned();
    }
    plans.into_iter().map(plan).collect::<Vec<_>>().join("\n")
}

fn plan(report: &Value) -> String {
    let mut out =
        format!("{}: {}, {}\n", text(&report["model"]), text(&report["phase"]), text(&report["detail"]));
    let plan = &report["plan"];
    if plan.is_null() {
        return out;
    }
    let bytes = |value: &Value| number(value, |bytes| format!("{}B", compact(bytes)));
    let row = |stage: &Value| {
        let layers = &stage["layers"];
        let last = layers[1].as_u64().map_or(0, |after| after.saturating_sub(1));
        [
            text(&stage["name"]),
            format!("{} to {last}", text(&layers[0])),
            bytes(&stage["weight_bytes"]),
            bytes(&stage["kv_bytes"]),
            bytes(&stage["memory_bytes"]),
            number(&stage["stage_s"], milliseconds),
            number(&stage["link_s"], milliseconds),
        ]
    };
    let rows: Vec<_> = list(&plan["stages"]).map(row).collect();
    out.push_str(&columns(["NODE", "LAYERS", "WEIGHTS", "KV", "MEMORY", "COMPUTES", "SENDS"], &rows));
    out.push_str(&format!(
        "predicted for {} rows in {} micro-batches: {} tokens/s, a token each {}, {} of the members' time waiting; room for \
         {} tokens\n",
        text(&plan["rows"]),
        text(&plan["micro_batches"]),
        number(&plan["tokens_per_s"], |rate| format!("{rate:.1}")),
        number(&plan["cycle_s"], milliseconds),
        number(&plan["bubble"], |share| format!("{:.0} %", share * 100.0)),
        text(&plan["kv_tokens"]),
    ));
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn the_heads_word_counts() {
        let stage = |name: &str, layers: [u32; 2]| {
            json!({ "name": name, "layers": layers, "weight_bytes": 4.5e9, "kv_bytes": 1e9, "memory_bytes": 16e9,
                    "stage_s": 0.0123, "link_s": 0.0005 })
        };
        let plan = json!({ "stages": [stage("a", [0, 20]), stage("b", [20, 32])], "kv_tokens": 32768, "rows": 16,
                           "micro_batches": 2, "cycle_s": 0.025, "tokens_per_s": 640.04, "bubble": 0.125 });
        let cluster = json!({ "nodes": [
            { "id": "2", "pipeline": { "model": "m", "head": "1", "phase": "running", "detail": "the head is a", "plan": null } },
            { "id": "1", "pipeline": { "model": "m", "head": "1", "phase": "running", "detail": "2 stages", "plan": plan } },
            { "id": "3", "pipeline": { "model": "n", "head": null, "phase": "refused", "detail": "too large", "plan": null } },
            { "id": "4", "pipeline": null },
        ]});
        let expected = "\
m: running, 2 stages
NODE  LAYERS    WEIGHTS  KV     MEMORY  COMPUTES  SENDS
a     0 to 19   4.5GB    1.0GB  16GB    12.3 ms   0.5 ms
b     20 to 31  4.5GB    1.0GB  16GB    12.3 ms   0.5 ms
predicted for 16 rows in 2 micro-batches: 640.0 tokens/s, a token each 25.0 ms, 12 % of the members' time waiting; room for 32768 tokens

n: refused, too large
";
        assert_eq!(shown(&cluster, None), expected);
        assert_eq!(shown(&cluster, Some("n")), "n: refused, too large\n");
        assert!(
            shown(&cluster, Some("m")).starts_with("m: running")
                && !shown(&cluster, Some("m")).contains("n: ")
        );
        let unknown = shown(&cluster, Some("x"));
        assert_eq!(unknown, "no node tells of a pipeline of \"x\"; there are: m, n\n");
        let none = json!({ "nodes": [] });
        assert!(shown(&none, None).starts_with("no node tells of a pipeline: "));
        assert!(shown(&none, Some("x")).ends_with("\"x\"; there is none\n"));
    }
}
