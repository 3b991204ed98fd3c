//! [`Figures`]: what is told of one policy, over one or several runs.

use super::sim::Outcomes;
use super::workload::Request;
use serde::Serialize;

/// Of one policy.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Figures {
    /// Mean seconds to the first token.
    pub ttft_mean_s: f64,
    /// Half of the requests had theirs by then.
    pub ttft_p50_s: f64,
    /// Nine in ten.
    pub ttft_p90_s: f64,
    /// 99 in 100.
    pub ttft_p99_s: f64,
    /// Mean seconds to the last token.
    pub e2e_mean_s: f64,
    /// Tokens of prompts found in caches, of all.
    pub hit_rate: f64,
    /// Requests answered, of those offered: 1 where none was refused.
    pub completed_of_offered: f64,
    /// Requests that each node got.
    pub requests_per_node: Vec<u64>,
    /// The busiest node's share of time, relative to the mean.
    pub imbalance: f64,
    /// Share of time that nodes were busy.
    pub busy: f64,
    /// Mean relative error of predicted times to the first token.
    pub prediction_error: f64,
    /// The same with its sign: above 0 where they were predicted too long.
    pub prediction_bias: f64,
}

impl Figures {
    pub(crate) fn of(requests: &[Request], arrivals: &[f64], outcomes: &Outcomes) -> Self {
        let done = || {
            let all = outcomes.requests.iter().zip(arrivals.iter().zip(requests));
            all.filter_map(|(outcome, (at_s, request))| Some((outcome.as_ref()?, at_s, request)))
        };
        let mut ttft: Vec<f64> = done().map(|(outcome, at_s, _)| outcome.first_token_s - at_s).collect();
        ttft.sort_by(f64::total_cmp);
        let quantile = |share: f64| {
            let index = (ttft.len() as f64 * share).ceil() as usize;
            ttft.get(index.saturating_sub(1)).copied().unwrap_or(0.0)
        };
        let count = ttft.len().max(1) as f64;
        let tokens: f64 = done().map(|(.., request)| f64::from(request.prompt_tokens)).sum();
        let busy_s = outcomes.busy_s.iter().sum::<f64>() / outcomes.busy_s.len().max(1) as f64;
        Self {
            ttft_mean_s: ttft.iter().sum::<f64>() / count,
            ttft_p50_s: quantile(0.5),
            ttft_p90_s: quantile(0.9),
            ttft_p99_s: quantile(0.99),
            e2e_mean_s: done().map(|(outcome, at_s, _)| outcome.end_s - at_s).sum::<f64>() / count,
            hit_rate: outcomes.matched_tokens as f64 / tokens.max(1.0),
            completed_of_offered: ttft.len() as f64 / requests.len().max(1) as f64,
            requests_per_node: outcomes.per_node.clone(),
            imbalance: outcomes.busy_s.iter().copied().fold(0.0, f64::max) / busy_s.max(1e-9),
            busy: busy_s / outcomes.end_s.max(1e-9),
            prediction_error: outcomes.predicted.0,
            prediction_bias: outcomes.predicted.1,
        }
    }

    /// The mean of each figure over runs of one length; requests of each node are added up.
    pub(crate) fn mean(runs: &[&Self]) -> Self {
        let mean =
            |part: fn(&Self) -> f64| runs.iter().map(|run| part(run)).sum::<f64>() / runs.len().max(1) as f64;
        let nodes = runs.iter().map(|run| run.requests_per_node.len()).max().unwrap_or(0);
        let of_node = |node: usize| runs.iter().filter_map(|run| run.requests_per_node.get(node)).sum();
        Self {
            ttft_mean_s: mean(|run| run.ttft_mean_s),
            ttft_p50_s: mean(|run| run.ttft_p50_s),
            ttft_p90_s: mean(|run| run.ttft_p90_s),
            ttft_p99_s: mean(|run| run.ttft_p99_s),
            e2e_mean_s: mean(|run| run.e2e_mean_s),
            hit_rate: mean(|run| run.hit_rate),
            completed_of_offered: mean(|run| run.completed_of_offered),
            requests_per_node: (0..nodes).map(of_node).collect(),
            imbalance: mean(|run| run.imbalance),
            busy: mean(|run| run.busy),
            prediction_error: mean(|run| run.prediction_error),
            prediction_bias: mean(|run| run.prediction_bias),
        }
    }
}
