//! Sizes and times as people write them: `128MiB`, `30s`.

use std::fmt;
use std::ops::RangeInclusive;
use std::str::FromStr;
use std::time::Duration;

/// A number of bytes, written as `4096`, `512KiB`, `128MiB`, `1GiB` or in
/// powers of ten as `10MB`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Size(pub u64);

const SIZE_UNITS: &[(&str, u64)] = &[
    ("B", 1),
    ("KiB", 1 << 10),
    ("MiB", 1 << 20),
    ("GiB", 1 << 30),
    ("TiB", 1 << 40),
    ("kB", 1_000),
    ("KB", 1_000),
    ("MB", 1_000_000),
    ("GB", 1_000_000_000),
];

impl FromStr for Size {
    type Err = String;

    fn from_str(text: &str) -> Result<Size, String> {
        let help = || format!("`{text}` is not a size; write for example `128MiB`, `512KiB` or `1GiB`");
        let (number, unit) = split_unit(text);
        let factor = if unit.is_empty() {
            1
        } else {
            SIZE_UNITS.iter().find(|(name, _)| *name == unit).map(|(_, factor)| *factor).ok_or_else(help)?
        };
        let number: u64 = number.parse().map_err(|_| help())?;
        number.checked_mul(factor).map(Size).ok_or_else(|| format!("`{text}` is too large"))
    }
}

impl fmt::Display for Size {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (unit, factor) = SIZE_UNITS[..5]
            .iter()
            .rev()
            .find(|(_, factor)| self.0 >= *factor && self.0.is_multiple_of(*factor))
            .unwrap_or(&SIZE_UNITS[0]);
        write!(f, "{}{unit}", self.0 / factor)
    }
}

/// Shows a number of bytes for people, with one digit after the point.
pub fn approximate(bytes: u64) -> String {
    #[expect(clippy::cast_precision_loss, reason = "only three digits are shown")]
    let bytes = bytes as f64;
    match bytes {
        b if b >= 1e9 => format!("{:.1} GB", b / 1e9),
        b if b >= 1e6 => format!("{:.1} MB", b / 1e6),
        b if b >= 1e3 => format!("{:.1} kB", b / 1e3),
        b => format!("{b} B"),
    }
}

/// Seconds of a century: more is a mistake, and would overflow a clock.
const LONGEST: u64 = 3_155_760_000;

/// A length of time, written as `500ms`, `30s`, `5m`, `2h` or `7d`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Time(pub Duration);

impl FromStr for Time {
    type Err = String;

    fn from_str(text: &str) -> Result<Time, String> {
        let help = || format!("`{text}` is not a time; write for example `30s`, `500ms` or `5m`");
        let (number, unit) = split_unit(text);
        let number: u64 = number.parse().map_err(|_| help())?;
        let seconds = |factor: u64| {
            number
                .checked_mul(factor)
                .filter(|seconds| *seconds <= LONGEST)
                .map(Duration::from_secs)
                .ok_or_else(|| format!("`{text}` is too long"))
        };
        match unit {
            "ms" if number > LONGEST * 1000 => Err(format!("`{text}` is too long")),
            "ms" => Ok(Duration::from_millis(number)),
            "s" => seconds(1),
            "m" | "min" => seconds(60),
            "h" => seconds(3600),
            "d" => seconds(86_400),
            _ => Err(help()),
        }
        .map(Time)
    }
}

impl fmt::Display for Time {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let milliseconds = self.0.as_millis();
        match milliseconds {
            0 => f.write_str("0s"),
            n if n % 3_600_000 == 0 => write!(f, "{}h", n / 3_600_000),
            n if n % 60_000 == 0 => write!(f, "{}m", n / 60_000),
            n if n % 1_000 == 0 => write!(f, "{}s", n / 1_000),
            n => write!(f, "{n}ms"),
        }
    }
}

/// Reads a unit of ours from a string in a configuration file.
macro_rules! from_string {
    ($type:ty, $pattern:literal) => {
        impl<'de> serde::Deserialize<'de> for $type {
            fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                let text = <std::borrow::Cow<'de, str>>::deserialize(deserializer)?;
                text.parse().map_err(serde::de::Error::custom)
            }
        }

        impl schemars::JsonSchema for $type {
            fn schema_name() -> std::borrow::Cow<'static, str> {
                stringify!($type).into()
            }

            fn json_schema(_: &mut schemars::SchemaGenerator) -> schemars::Schema {
                schemars::json_schema!({ "type": "string", "pattern": $pattern })
            }
        }
    };
}
from_string!(Size, "^[0-9]+ ?(B|KiB|MiB|GiB|TiB|kB|KB|MB|GB)?$");
from_string!(Time, "^[0-9]+ ?(ms|s|m|min|h|d)$");

/// Reads a value of the command line that must be within `range`.
pub fn within<T>(range: RangeInclusive<T>) -> impl Fn(&str) -> Result<T, String> + Clone
where
    T: FromStr<Err: fmt::Display> + fmt::Display + PartialOrd + Clone,
{
    move |text| {
        let value: T = text.parse().map_err(|error: T::Err| error.to_string())?;
        check(&value, &range)?;
        Ok(value)
    }
}

/// Checks that `value` is within `range`.
///
/// # Errors
///
/// That it is not, with the bound.
pub fn check<T: fmt::Display + PartialOrd>(value: &T, range: &RangeInclusive<T>) -> Result<(), String> {
    if value < range.start() {
        return Err(format!("`{value}` is too little: the least is {}", range.start()));
    }
    if value > range.end() {
        return Err(format!("`{value}` is too much: the most is {}", range.end()));
    }
    Ok(())
}

/// Splits `128MiB` into `128` and `MiB`.
fn split_unit(text: &str) -> (&str, &str) {
    let end = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    (&text[..end], text[end..].trim_start_matches(' '))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_read_and_show_the_same() {
        for (text, bytes) in [("128MiB", 128 << 20), ("1GiB", 1 << 30), ("0B", 0), ("1500B", 1500)] {
            assert_eq!(text.parse::<Size>().unwrap(), Size(bytes));
            assert_eq!(Size(bytes).to_string(), text);
        }
        assert_eq!("10MB".parse::<Size>().unwrap(), Size(10_000_000));
        assert_eq!("4096".parse::<Size>().unwrap(), Size(4096));
        for bad in ["", "MiB", "-1MiB", "1.5GiB", "10mib", "99999999999GiB"] {
            assert!(bad.parse::<Size>().unwrap_err().contains(bad), "{bad}");
        }
    }

    #[test]
    fn times_read_and_show_the_same() {
        for (text, milliseconds) in [("30s", 30_000), ("500ms", 500), ("5m", 300_000), ("2h", 7_200_000)] {
            assert_eq!(text.parse::<Time>().unwrap().0.as_millis(), milliseconds);
            assert_eq!(text.parse::<Time>().unwrap().to_string(), text);
        }
        for bad in ["", "s", "30", "-1s", "1w", "99999999999h", "18446744073709551615ms", "40000d"] {
            assert!(bad.parse::<Time>().is_err(), "{bad}");
        }
        assert_eq!("7d".parse::<Time>().unwrap().to_string(), "168h");
        assert_eq!("3155760000000ms".parse::<Time>().unwrap().0.as_secs(), LONGEST);
    }

    #[test]
    fn a_value_out_of_its_range_is_refused_with_the_bound() {
        let read = within(Size(1 << 10)..=Size(1 << 20));
        assert_eq!(read("1KiB"), Ok(Size(1024)));
        assert_eq!(read("1MiB"), Ok(Size(1 << 20)));
        assert_eq!(read("1023B"), Err("`1023B` is too little: the least is 1KiB".into()));
        assert_eq!(read("2MiB"), Err("`2MiB` is too much: the most is 1MiB".into()));
        assert!(read("some").unwrap_err().contains("is not a size"));
        let read = within(Time(Duration::from_millis(1))..=Time(Duration::from_secs(60)));
        assert_eq!(read("0s"), Err("`0s` is too little: the least is 1ms".into()));
    }

    /// The patterns of the schema know every unit.
    #[test]
    fn the_schema_has_all_units() {
        let schema = serde_json::to_string(&schemars::schema_for!((Size, Time)).to_value()).unwrap();
        for unit in ["ms|", "|s|", "|m|", "|min|", "|h|", "|d)"] {
            assert!(schema.contains(unit), "{unit}: {schema}");
        }
        for (unit, _) in SIZE_UNITS {
            assert!(schema.contains(&format!("|{unit}")) || *unit == "B", "{unit}: {schema}");
        }
    }
}
