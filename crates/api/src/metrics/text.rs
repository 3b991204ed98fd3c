//! Prometheus' text format, version 0.0.4.

use super::histogram::Histogram;
use std::fmt::Write;

/// Its media type.
pub(super) const CONTENT_TYPE: &str = "text/plain; version=0.0.4; charset=utf-8";

/// Names of labels with their values.
pub(super) type Labels<'a> = &'a [(&'a str, &'a str)];

/// Metrics, family by family. Names are the callers' to choose well: letters, digits and underscores.
#[derive(Debug, Default)]
pub(super) struct Exposition {
    text: String,
    name: &'static str,
}

impl Exposition {
    /// Begins a family that only grows.
    pub(super) fn counter(&mut self, name: &'static str, help: &str) -> &mut Self {
        self.family(name, "counter", help)
    }

    /// Begins a family that rises and falls.
    pub(super) fn gauge(&mut self, name: &'static str, help: &str) -> &mut Self {
        self.family(name, "gauge", help)
    }

    /// Begins a family of histograms.
    pub(super) fn histograms(&mut self, name: &'static str, help: &str) -> &mut Self {
        self.family(name, "histogram", help)
    }

    fn family(&mut self, name: &'static str, kind: &str, help: &str) -> &mut Self {
        self.name = name;
        self.line(format_args!("# HELP {name} {help}"));
        self.line(format_args!("# TYPE {name} {kind}"));
        self
    }

    /// A member of the family begun last.
    pub(super) fn value(&mut self, labels: Labels<'_>, value: f64) -> &mut Self {
        self.sample("", labels, None, value);
        self
    }

    /// The same, of a family of histograms.
    pub(super) fn histogram(&mut self, labels: Labels<'_>, histogram: &Histogram) -> &mut Self {
        for (bound, count) in histogram.cumulative() {
            let bound = if bound.is_finite() { bound.to_string() } else { "+Inf".to_owned() };
            self.sample("_bucket", labels, Some(("le", &bound)), count as f64);
        }
        self.sample("_sum", labels, None, histogram.sum());
        self.sample("_count", labels, None, histogram.count() as f64);
        self
    }

    pub(super) fn finish(self) -> String {
        self.text
    }

    fn sample(&mut self, suffix: &str, labels: Labels<'_>, last: Option<(&str, &str)>, value: f64) {
        self.text.push_str(self.name);
        self.text.push_str(suffix);
        let mut before = '{';
        for (name, value) in labels.iter().copied().chain(last) {
            self.text.push(before);
            self.text.push_str(name);
            self.text.push_str("=\"");
            for char in value.chars() {
                match char {
                    '\\' => self.text.push_str("\\\\"),
                    '"' => self.text.push_str("\\\""),
                    '\n' => self.text.push_str("\\n"),
                    char => self.text.push(char),
                }
            }
            self.text.push('"');
            before = ',';
        }
        if before == ',' {
            self.text.push('}');
        }
        self.line(format_args!(" {value}"));
    }

    fn line(&mut self, line: std::fmt::Arguments<'_>) {
        writeln!(self.text, "{line}").expect("a String takes everything");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn families_are_written_as_prometheus_reads_them() {
        let mut out = Exposition::default();
        out.counter("a_total", "Things.").value(&[], 3.0).value(&[("x", "q\"\\\n"), ("y", "")], 0.25);
        let mut histogram = Histogram::new(&[0.5, 1.0]);
        histogram.observe(0.75, 2);
        out.histograms("b", "Sizes.").histogram(&[("m", "n")], &histogram);
        let expected = "\
# HELP a_total Things.
# TYPE a_total counter
a_total 3
a_total{x=\"q\\\"\\\\\\n\",y=\"\"} 0.25
# HELP b Sizes.
# TYPE b histogram
b_bucket{m=\"n\",le=\"0.5\"} 0
b_bucket{m=\"n\",le=\"1\"} 2
b_bucket{m=\"n\",le=\"+Inf\"} 2
b_sum{m=\"n\"} 1.5
b_count{m=\"n\"} 2
";
        assert_eq!(out.finish(), expected);
    }
}
