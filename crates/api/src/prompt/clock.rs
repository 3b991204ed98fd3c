//! `strftime_now` for chat templates that tell the model today's date. UTC: a cluster's nodes need not share a time zone.

use std::time::SystemTime;

const DAYS: [&str; 7] = ["Sunday", "Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday"];
const MONTHS: [&str; 12] = [
    "January",
    "February",
    "March",
    "April",
    "May",
    "June",
    "July",
    "August",
    "September",
    "October",
    "November",
    "December",
];

/// Seconds since 1970; 0 where the clock is set before.
pub(crate) fn unix_seconds(now: SystemTime) -> u64 {
    now.duration_since(SystemTime::UNIX_EPOCH).map_or(0, |since| since.as_secs())
}

/// Formats a time as C's `strftime` does in the C locale; none for a directive that it does not know.
pub(crate) fn strftime(format: &str, unix_s: u64) -> Option<String> {
    let (days, second_of_day) = (unix_s / 86_400, unix_s % 86_400);
    let (year, month, day) = civil_from_days(days);
    let (hour, minute, second) = (second_of_day / 3600, second_of_day / 60 % 60, second_of_day % 60);
    let month_name = MONTHS[month as usize - 1];
    let day_name = DAYS[((days + 4) % 7) as usize];
    let hour12 = (hour + 11) % 12 + 1;
    let day_of_year = days - days_from_new_year(year) + 1;
    let mut out = String::new();
    let mut chars = format.chars();
    while let Some(char) = chars.next() {
        if char != '%' {
            out.push(char);
            continue;
        }
        let mut directive = chars.next()?;
        let padded = directive != '-';
        if !padded {
            directive = chars.next()?;
        }
        let number = |value: u64, width: usize| {
            if padded { format!("{value:0width$}") } else { value.to_string() }
        };
        out.push_str(&match directive {
            'a' => day_name[..3].to_owned(),
            'A' => day_name.to_owned(),
            'b' | 'h' => month_name[..3].to_owned(),
            'B' => month_name.to_owned(),
            'd' => number(day, 2),
            'D' => format!("{month:02}/{day:02}/{:02}", year % 100),
            'e' => format!("{day:2}"),
            'F' => format!("{year}-{month:02}-{day:02}"),
            'H' => number(hour, 2),
            'I' => number(hour12, 2),
            'j' => number(day_of_year, 3),
            'm' => number(month, 2),
            'M' => number(minute, 2),
            'p' => if hour < 12 { "AM" } else { "PM" }.to_owned(),
            'S' => number(second, 2),
            's' => unix_s.to_string(),
            'T' => format!("{hour:02}:{minute:02}:{second:02}"),
            'w' => ((days + 4) % 7).to_string(),
            'y' => number(year % 100, 2),
            'Y' => year.to_string(),
            'z' => "+0000".to_owned(),
            'Z' => "UTC".to_owned(),
            '%' => "%".to_owned(),
            _ => return None,
        });
    }
    Some(out)
}

/// Year, month and day of a number of days since 1970, by the usual counting from 1 March 0000 in eras of 400 years.
fn civil_from_days(days: u64) -> (u64, u64, u64) {
    let days = days + 719_468;
    let (era, day_of_era) = (days / 146_097, days % 146_097);
    let year_of_era = (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let shifted_month = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * shifted_month + 2) / 5 + 1;
    let month = if shifted_month < 10 { shifted_month + 3 } else { shifted_month - 9 };
    (era * 400 + year_of_era + u64::from(month <= 2), month, day)
}

/// Days from 1970 to the first of January of `year`.
fn days_from_new_year(year: u64) -> u64 {
    let before = year - 1;
    before * 365 + before / 4 - before / 100 + before / 400 - 719_162
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn formats_as_c_does() {
        // Made with `date -u -d @SECONDS +FORMAT`, LC_ALL=C.
        let check = |unix_s, format: &str, expected: Option<&str>| {
            assert_eq!(strftime(format, unix_s).as_deref(), expected, "{format} of {unix_s}");
        };
        check(0, "%A %d %B %Y %j %H:%M:%S", Some("Thursday 01 January 1970 001 00:00:00"));
        check(1_709_210_096, "%a %d %b %Y, %-d %e %I:%M %p %j", Some("Thu 29 Feb 2024, 29 29 12:34 PM 060"));
        check(1_735_689_599, "%Y-%m-%d %T %j 100%%", Some("2024-12-31 23:59:59 366 100%"));
        check(4_107_542_400, "%F %A", Some("2100-03-01 Monday"));
        check(0, "%Q", None);
        check(0, "%", None);
    }
}
