//! Columns of text for people.

/// Lines of columns as wide as their widest cell; the first line is the heads.
pub(crate) fn columns<const N: usize>(heads: [&str; N], rows: &[[String; N]]) -> String {
    let heads = heads.map(str::to_owned);
    let rows: Vec<&[String; N]> = std::iter::once(&heads).chain(rows).collect();
    let width = |column: usize| rows.iter().map(|row| row[column].chars().count()).max().unwrap_or(0);
    let widths: [usize; N] = std::array::from_fn(width);
    let mut out = String::new();
    for row in rows {
        let cells = row.iter().zip(widths).map(|(cell, width)| format!("{cell:width$}"));
        out.push_str(cells.collect::<Vec<_>>().join("  ").trim_end());
        out.push('\n');
    }
    out
}

/// A number with a unit of thousands, in four characters or so.
pub(crate) fn compact(number: f64) -> String {
    let units = [(1e9, "G"), (1e6, "M"), (1e3, "k")];
    match units.into_iter().find(|(scale, _)| number >= *scale) {
        Some((scale, unit)) if number / scale < 10.0 => format!("{:.1}{unit}", number / scale),
        Some((scale, unit)) => format!("{:.0}{unit}", number / scale),
        None => format!("{number:.0}"),
    }
}

/// What is not known.
pub(crate) const NONE: &str = "-";

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cells_line_up() {
        let rows = [["é".to_owned(), "1".to_owned()], ["long".to_owned(), NONE.to_owned()]];
        assert_eq!(columns(["A", "B"], &rows), "A     B\né     1\nlong  -\n");
    }

    #[test]
    fn numbers_are_short() {
        let check = |number: f64, expected: &str| assert_eq!(compact(number), expected);
        check(0.0, "0");
        check(999.0, "999");
        check(1234.0, "1.2k");
        check(45_600.0, "46k");
        check(2.5e6, "2.5M");
        check(1e9, "1.0G");
    }
}
