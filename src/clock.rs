//! The time of day, as milliseconds since 1970 and as the two dates that the program writes.

use std::time::UNIX_EPOCH;

/// Milliseconds since 1970-01-01 UTC; 0 on a host whose clock stands before that.
pub fn unix_millis() -> u64 {
    UNIX_EPOCH.elapsed().map_or(0, |since| since.as_millis() as u64)
}

/// `2026-11-22T12:00:00.000Z` (RFC 3339), as log lines begin.
pub fn rfc3339(millis: u64) -> String {
    let (year, month, day, time) = calendar(millis / 1000);
    format!("{year:04}-{month:02}-{day:02}T{time}.{:03}Z", millis % 1000)
}

/// `Sun, 22 Nov 2026 12:00:00 GMT` (IMF-fixdate, RFC 9110 section 5.6.7), as the `Date` field has
/// it.
pub fn imf_fixdate(millis: u64) -> String {
    let (year, month, day, time) = calendar(millis / 1000);
    // 1970 began on a Thursday.
    let weekday = &"ThuFriSatSunMonTueWed"[(millis / 86_400_000) as usize % 7 * 3..][..3];
    let month = &"JanFebMarAprMayJunJulAugSepOctNovDec"[(month - 1) * 3..][..3];
    format!("{weekday}, {day:02} {month} {year:04} {time} GMT")
}

/// Year, month and day in the Gregorian calendar, and the time of day, of a second counted from
/// 1970-01-01.
fn calendar(seconds: u64) -> (u64, usize, u64, String) {
    let leap_days = |year: u64| u64::from(year % 4 == 0 && (year % 100 != 0 || year % 400 == 0));
    // Counted from 0, until months and days are told.
    let (mut year, mut month, mut day) = (1970, 0, seconds / 86_400);
    while day >= 365 + leap_days(year) {
        day -= 365 + leap_days(year);
        year += 1;
    }
    let lengths = [31, 28 + leap_days(year), 31, 30, 31, 30, 31, 31, 30, 31, 30, 31];
    while day >= lengths[month] {
        day -= lengths[month];
        month += 1;
    }
    let (hour, minute, second) = (seconds / 3600 % 24, seconds / 60 % 60, seconds % 60);
    (year, month + 1, day + 1, format!("{hour:02}:{minute:02}:{second:02}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dates_of_known_moments() {
        let table = [
            (0, "1970-01-01T00:00:00.000Z", "Thu, 01 Jan 1970 00:00:00 GMT"),
            (951_782_399_999, "2000-02-28T23:59:59.999Z", "Mon, 28 Feb 2000 23:59:59 GMT"),
            (951_782_400_001, "2000-02-29T00:00:00.001Z", "Tue, 29 Feb 2000 00:00:00 GMT"),
            (1_078_012_800_000, "2004-02-29T00:00:00.000Z", "Sun, 29 Feb 2004 00:00:00 GMT"),
            (1_795_348_800_000, "2026-11-22T12:00:00.000Z", "Sun, 22 Nov 2026 12:00:00 GMT"),
            (4_107_542_400_000, "2100-03-01T00:00:00.000Z", "Mon, 01 Mar 2100 00:00:00 GMT"),
            (13_574_563_200_000, "2400-02-29T00:00:00.000Z", "Tue, 29 Feb 2400 00:00:00 GMT"),
        ];
        for (millis, log, field) in table {
            assert_eq!((rfc3339(millis).as_str(), imf_fixdate(millis).as_str()), (log, field));
        }
    }

    /// Day by day over four centuries, against the calendar's own rule.
    #[test]
    fn every_day_follows_the_last() {
        let midnight = "00:00:00".to_string();
        let (mut year, mut month, mut day) = (1970, 1, 1);
        for days in 0..146_097 {
            assert_eq!(calendar(days * 86_400), (year, month, day, midnight.clone()));
            let leap = year % 4 == 0 && (year % 100 != 0 || year % 400 == 0);
            let last =
                [31, if leap { 29 } else { 28 }, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31][month - 1];
            day += 1;
            if day > last {
                (day, month) = (1, month + 1);
            }
            if month > 12 {
                (month, year) = (1, year + 1);
            }
        }
    }
}
