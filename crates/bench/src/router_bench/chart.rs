//! [`chart`]: times to the first token of all policies, as an SVG for the docs.

use super::RouterReport;
use std::fmt::Write;

const WIDTH: f64 = 760.0;
/// Left of it names, right of it figures.
const PLOT: (f64, f64) = (120.0, 640.0);
const ROW: f64 = 26.0;
const HEAD: f64 = 48.0;

/// For each report and policy a bar from the median to nine in ten, a line on to 99 in 100 and a mark at the mean, over a
/// logarithmic scale.
pub fn chart(reports: &[RouterReport]) -> String {
    let figures = || reports.iter().flat_map(|report| report.policies.values());
    let least = figures().map(|one| one.ttft_p50_s.max(1e-4)).fold(f64::INFINITY, f64::min);
    let most = figures().map(|one| one.ttft_p99_s.max(1e-3)).fold(least * 10.0, f64::max);
    let (low, high) = (least.log10().floor(), most.log10().ceil());
    let x = |seconds: f64| {
        let share = (seconds.max(1e-9).log10() - low) / (high - low);
        PLOT.0 + share.clamp(0.0, 1.0) * (PLOT.1 - PLOT.0)
    };
    let rows: usize = reports.iter().map(|report| report.policies.len()).sum();
    let height = HEAD * (reports.len() + 1) as f64 + ROW * rows as f64;
    let mut svg = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {height}\" font-family=\"sans-serif\" \
         font-size=\"12\">\n<rect width=\"100%\" height=\"100%\" fill=\"white\"/>\n"
    );
    let mut add = |line: String| _ = writeln!(svg, "{line}");
    for decade in low as i32..=high as i32 {
        let (at, seconds) = (x(10f64.powi(decade)), 10f64.powi(decade));
        add(format!("<path d=\"M{at:.1} {HEAD}V{:.1}\" stroke=\"#ddd\"/>", height - HEAD));
        add(format!(
            "<text x=\"{at:.1}\" y=\"{:.1}\" text-anchor=\"middle\">{seconds} s</text>",
            height - 28.0
        ));
    }
    add(format!(
        "<text x=\"{}\" y=\"{:.1}\">time to the first token: bar p50 to p90, line to p99, dot mean</text>",
        PLOT.0,
        height - 8.0
    ));
    let mut top = 0.0;
    for report in reports {
        let kind = if report.unequal { "unequal" } else { "equal" };
        let title = format!("{}, {} {kind} nodes", report.workload, report.nodes);
        add(format!("<text x=\"{}\" y=\"{:.1}\" font-weight=\"bold\">{title}</text>", PLOT.0, top + 36.0));
        top += HEAD;
        for (policy, one) in &report.policies {
            let (middle, colour) = (top + ROW / 2.0, if policy == "cost" { "#1a7f5a" } else { "#8899aa" });
            let [p50, p90, p99, mean] =
                [one.ttft_p50_s, one.ttft_p90_s, one.ttft_p99_s, one.ttft_mean_s].map(x);
            add(format!(
                "<text x=\"{}\" y=\"{:.1}\" text-anchor=\"end\">{policy}</text>",
                PLOT.0 - 8.0,
                middle + 4.0
            ));
            add(format!(
                "<path d=\"M{p50:.1} {middle:.1}H{p99:.1}\" stroke=\"{colour}\" stroke-width=\"2\"/>"
            ));
            add(format!(
                "<rect x=\"{p50:.1}\" y=\"{:.1}\" width=\"{:.1}\" height=\"12\" fill=\"{colour}\"/>",
                middle - 6.0,
                (p90 - p50).max(1.0)
            ));
            add(format!(
                "<circle cx=\"{mean:.1}\" cy=\"{middle:.1}\" r=\"4\" fill=\"white\" stroke=\"black\"/>"
            ));
            add(format!(
                "<text x=\"{}\" y=\"{:.1}\">{:.3} s</text>",
                PLOT.1 + 12.0,
                middle + 4.0,
                one.ttft_mean_s
            ));
            top += ROW;
        }
    }
    svg.push_str("</svg>\n");
    svg
}
