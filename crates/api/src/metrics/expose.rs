//! `GET /metrics`: what the board counted, and what the directory tells of the nodes now.

use super::{
    board::{Board, Figures, ModelFigures},
    histogram::Histogram,
    life::End,
    process,
    text::{CONTENT_TYPE, Exposition},
};
use crate::AppState;
use axum::{
    extract::State,
    http::header,
    response::{IntoResponse, Response},
};
use types::{ClusterView, DraftOrigin, EngineState, NodeLoad, NodeView};

/// Rows of the decode steps that [`NodeLoad::decode_step_s`] tells of.
const STEP_ROWS: [&str; 8] = ["1", "2", "4", "8", "16", "32", "64", "128"];

pub(crate) async fn metrics(State(state): State<AppState>) -> Response {
    let text = write(&state.board, &state.directory.view());
    ([(header::CONTENT_TYPE, CONTENT_TYPE), (header::CACHE_CONTROL, "no-store")], text).into_response()
}

fn write(board: &Board, view: &ClusterView) -> String {
    let mut out = Exposition::default();
    {
        let figures = board.figures();
        requests(&mut out, &figures);
        histograms(&mut out, &figures);
        answers(&mut out, &figures);
    }
    router(&mut out, view);
    nodes(&mut out, view);
    loads(&mut out, view);
    out.gauge("mlx_uptime_seconds", "Since this router's endpoint started.").value(&[], board.uptime_s());
    if let Some(process) = process::figures() {
        out.gauge("process_resident_memory_bytes", "Resident memory of this process, without its engine's.")
            .value(&[], process.resident_bytes as f64);
        out.gauge("process_open_fds", "Open file descriptors of this process.")
            .value(&[], process.open_fds as f64);
    }
    out.finish()
}

fn requests(out: &mut Exposition, figures: &Figures) {
    let name = "mlx_request_success_total";
    out.counter(name, "Requests answered to their end, through this router.");
    for (model, of_model) in &figures.models {
        for end in [End::Stop, End::Length] {
            let count = of_model.ends.get(&end).copied().unwrap_or(0);
            out.value(&[("model_name", model), ("finished_reason", end.label())], count as f64);
        }
    }
    let name = "mlx_request_failure_total";
    out.counter(name, "Requests not answered, or not to their end; abort: the client went away.");
    for (model, of_model) in &figures.models {
        for (end, count) in of_model.ends.iter().filter(|(end, _)| matches!(end, End::Failed(_))) {
            out.value(&[("model_name", model), ("reason", end.label())], *count as f64);
        }
    }
    type Count = fn(&ModelFigures) -> u64;
    let counts: [(&'static str, &str, Count); 4] = [
        ("mlx_prompt_tokens_total", "Tokens of prompts that were read.", |model| model.prompt_tokens),
        ("mlx_generation_tokens_total", "Tokens generated.", |model| model.generation_tokens),
        ("mlx_prefix_cache_queries_total", "Tokens of prompts looked for in prefix caches.", |model| {
            model.prompt_tokens
        }),
        ("mlx_prefix_cache_hits_total", "Tokens of prompts found in prefix caches.", |model| {
            model.cached_tokens
        }),
    ];
    for (name, help, count) in counts {
        out.counter(name, help);
        for (model, of_model) in &figures.models {
            out.value(&[("model_name", model)], count(of_model) as f64);
        }
    }
    out.counter("mlx_routes_total", "Requests sent to a node, by why it was chosen.");
    for ((node, reason), count) in &figures.routes {
        out.value(&[("node", node), ("reason", reason)], *count as f64);
    }
}

fn histograms(out: &mut Exposition, figures: &Figures) {
    type Of = fn(&ModelFigures) -> &Histogram;
    let families: [(&'static str, &str, Of); 7] = [
        ("mlx_time_to_first_token_seconds", "From a request's arrival to its first token.", |model| {
            &model.first_token_s
        }),
        ("mlx_inter_token_latency_seconds", "Between two tokens of an answer.", |model| {
            &model.between_tokens_s
        }),
        ("mlx_request_time_per_output_token_seconds", "Mean of that, of each answer.", |model| {
            &model.per_token_s
        }),
        (
            "mlx_request_queue_time_seconds",
            "From a request's arrival to its acceptance by a node.",
            |model| &model.queue_s,
        ),
        ("mlx_e2e_request_latency_seconds", "From a request's arrival to the end of its answer.", |model| {
            &model.request_s
        }),
        ("mlx_request_prompt_tokens", "Tokens of a prompt.", |model| &model.request_prompt_tokens),
        ("mlx_request_generation_tokens", "Tokens of an answer.", |model| &model.request_tokens),
    ];
    for (name, help, of) in families {
        out.histograms(name, help);
        for (model, of_model) in &figures.models {
            out.histogram(&[("model_name", model)], of(of_model));
        }
    }
}

fn answers(out: &mut Exposition, figures: &Figures) {
    out.counter("http_requests_total", "HTTP requests, by how they were answered; a stream as it began.");
    for ((handler, method, status), count) in &figures.answers {
        let status = status.to_string();
        out.value(&[("handler", handler), ("method", method), ("status", &status)], *count as f64);
    }
}

fn router(out: &mut Exposition, view: &ClusterView) {
    out.gauge("mlx_router_requests_in_flight", "Requests that this router has at nodes.")
        .value(&[], f64::from(view.in_flight));
    out.gauge("mlx_router_requests_waiting", "Requests that wait at this router for a node.")
        .value(&[], f64::from(view.waiting));
    out.gauge("mlx_router_draining", "1 while this router is leaving.")
        .value(&[], f64::from(u8::from(view.draining)));
    out.counter("mlx_router_moves_total", "Requests that did not stay where they were sent.")
        .value(&[("kind", "retried")], view.moves.retried as f64)
        .value(&[("kind", "resumed")], view.moves.resumed as f64)
        .value(&[("kind", "hedged")], view.moves.hedged as f64)
        .value(&[("kind", "hedge_won")], view.moves.hedge_won as f64);
    out.counter("mlx_router_breaker_trips_total", "Times that a node was left alone, since it failed.")
        .value(&[], view.moves.tripped as f64);
}

fn nodes(out: &mut Exposition, view: &ClusterView) {
    out.gauge("mlx_node_info", "Nodes of the cluster.");
    for node in &view.nodes {
        let (id, local) = (node.id.to_string(), node.local.to_string());
        out.value(
            &[
                ("node", node.name.as_str()),
                ("node_id", &id),
                ("version", &node.version),
                ("hardware", &node.hardware),
                ("local", &local),
            ],
            1.0,
        );
    }
    out.gauge("mlx_node_state", "1 for the state that a node's engine is in.");
    for node in &view.nodes {
        let states = [
            ("loading", matches!(node.engine, EngineState::Loading)),
            ("ready", matches!(node.engine, EngineState::Ready)),
            ("draining", matches!(node.engine, EngineState::Draining)),
            ("restarting", matches!(node.engine, EngineState::Restarting(_))),
            ("pipeline", matches!(node.engine, EngineState::Pipeline(_))),
        ];
        for (state, is) in states {
            let id = node.id.to_string();
            out.value(&[("node", &node.name), ("node_id", &id), ("state", state)], f64::from(u8::from(is)));
        }
    }
    type Of = fn(&NodeView) -> Option<f64>;
    let gauges: [(&'static str, &str, Of); 6] = [
        ("mlx_node_avoided", "1 while this router leaves a node alone, since it failed lately.", |node| {
            Some(f64::from(u8::from(node.avoided)))
        }),
        ("mlx_node_rtt_seconds", "Round trip to a node.", |node| node.rtt_s.map(f64::from)),
        ("mlx_node_known_blocks", "Blocks of a node's cache that this router knows of.", |node| {
            Some(node.cached_blocks as f64)
        }),
        (
            "mlx_ttft_prediction_bias_ratio",
            "Mean relative error of predicted times to the first token; above 0: predicted too long.",
            |node| Some(node.prediction.bias),
        ),
        ("mlx_ttft_prediction_error_ratio", "Mean of its magnitude.", |node| Some(node.prediction.error)),
        ("mlx_ttft_predictions", "Requests that the predictions for a node were learned from.", |node| {
            Some(node.prediction.requests as f64)
        }),
    ];
    for (name, help, of) in gauges {
        out.gauge(name, help);
        for node in &view.nodes {
            if let Some(value) = of(node) {
                out.value(&[("node", &node.name), ("node_id", &node.id.to_string())], value);
            }
        }
    }
}

fn loads(out: &mut Exposition, view: &ClusterView) {
    type Of = fn(&NodeLoad) -> f64;
    let gauges: [(&'static str, &str, Of); 11] = [
        ("mlx_num_requests_running", "Requests being read or written.", |load| f64::from(load.running)),
        ("mlx_num_requests_waiting", "Requests waiting at a node for a slot.", |load| {
            f64::from(load.waiting)
        }),
        ("mlx_slots", "Requests that can run at once.", |load| f64::from(load.slots)),
        ("mlx_kv_cache_usage_perc", "Share of the KV that running requests hold; 1: all.", |load| {
            load.kv_tokens.0 as f64 / load.kv_tokens.1.max(1) as f64
        }),
        ("mlx_kv_cache_used_tokens", "Tokens of KV that running requests hold.", |load| {
            load.kv_tokens.0 as f64
        }),
        ("mlx_kv_cache_cached_tokens", "Tokens of KV that the prefix cache holds.", |load| {
            load.cached_kv_tokens as f64
        }),
        ("mlx_kv_cache_size_tokens", "Tokens of KV that there are.", |load| load.kv_tokens.1 as f64),
        ("mlx_prefill_backlog_tokens", "Tokens of prompts that are not read yet.", |load| {
            load.prefill_backlog_tokens as f64
        }),
        ("mlx_prefill_backlog_seconds", "Seconds that this will take.", |load| {
            f64::from(load.prefill_backlog_s)
        }),
        ("mlx_decode_backlog_tokens", "Tokens still to be generated, at most.", |load| {
            load.decode_backlog_tokens as f64
        }),
        ("mlx_prefill_tokens_per_second", "Speed of reading when nothing else runs.", |load| {
            f64::from(load.rates.prefill_tokens_per_s)
        }),
    ];
    let loads: Vec<_> = view
        .nodes
        .iter()
        .filter_map(|node| {
            let models: Vec<&str> = node.models.iter().map(|card| card.name.as_str()).collect();
            Some((&node.name, node.id.to_string(), models.join(","), node.load.as_ref()?))
        })
        .collect();
    for (name, help, of) in gauges {
        out.gauge(name, help);
        for (node, id, models, load) in &loads {
            out.value(&[("node", node), ("node_id", id), ("model_name", models)], of(load));
        }
    }
    out.gauge("mlx_decode_step_seconds", "Time of a step that writes one token for each of some rows.");
    for (node, id, _, load) in &loads {
        for (rows, seconds) in STEP_ROWS.into_iter().zip(load.decode_step_s) {
            out.value(&[("node", node), ("node_id", id), ("rows", rows)], f64::from(seconds));
        }
    }
    out.counter("mlx_engine_passes_total", "Passes of a node's engine since it started.");
    for (node, id, _, load) in &loads {
        out.value(&[("node", node), ("node_id", id)], load.passes as f64);
    }
    out.counter(
        "mlx_draft_tokens_total",
        "Tokens guessed ahead, by where they came from and what came of them.",
    );
    for (node, id, _, load) in &loads {
        for (origin, count) in DraftOrigin::ALL.into_iter().zip(load.drafts) {
            for (outcome, tokens) in [("accepted", count.accepted), ("rejected", count.rejected)] {
                let labels = [
                    ("node", node.as_str()),
                    ("node_id", id),
                    ("source", origin.name()),
                    ("outcome", outcome),
                ];
                out.value(&labels, tokens as f64);
            }
        }
    }
}
