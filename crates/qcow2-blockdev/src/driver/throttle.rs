//! Groups of limits: the objects that `throttle` nodes name.

use crate::keyvalue::KeyValues;
use crate::scalar::read_number;
use qcow2_io::{LimitError, Rate, SystemPace, ThrottleGroup, ThrottleLimits};
use std::fmt;

/// Why a text defines no group of limits.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum ThrottleError {
    /// An item that is not known.
    Unexpected(String),
    /// All limits are one item, and this is not one.
    NotAnObject,
    /// The value of this item is not an integer.
    NotAnInteger(String),
    /// A limit is negative.
    Negative,
    /// The value of this item is larger than 2^32 - 1.
    TooManySeconds(String),
    /// The limits contradict each other.
    Limits(LimitError),
}

impl fmt::Display for ThrottleError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unexpected(key) => write!(f, "a group of limits has no '{key}'"),
            Self::NotAnObject => f.write_str("'limits' is a group of limits, not a value"),
            Self::NotAnInteger(key) => write!(f, "'{key}' is not an integer"),
            Self::Negative => f.write_str("a limit is negative"),
            Self::TooManySeconds(key) => write!(f, "'{key}' is at most {} seconds", u32::MAX),
            Self::Limits(error) => error.fmt(f),
        }
    }
}

impl std::error::Error for ThrottleError {}

/// The group whose limits the items of `list` are: `limits.iops-total`, `x-bps-read-max-length` and so on.
/// Later items override earlier ones, and those with `limits.` are set after those with `x-`.
pub(crate) fn throttle_group(list: &KeyValues) -> Result<ThrottleGroup, ThrottleError> {
    let mut given = Vec::new();
    for pair in list.pairs().iter().filter(|pair| !matches!(&*pair.key, "qom-type" | "id")) {
        let (name, grouped) = match (pair.key.strip_prefix("x-"), pair.key.strip_prefix("limits.")) {
            (Some(name), _) => (name, false),
            (None, Some(name)) => (name, true),
            (None, None) if pair.key == "limits" => return Err(ThrottleError::NotAnObject),
            (None, None) => return Err(ThrottleError::Unexpected(pair.key.clone())),
        };
        let field = Field::parse(name).ok_or_else(|| ThrottleError::Unexpected(pair.key.clone()))?;
        given.push((grouped, field, integer(&pair.key, &pair.value)?, &*pair.key));
    }
    given.sort_by_key(|(grouped, ..)| *grouped);
    let mut limits = ThrottleLimits::default();
    for (grouped, field, value, key) in given {
        field.set(&mut limits, value, key, grouped)?;
    }
    ThrottleGroup::new(limits, SystemPace::start()).map_err(ThrottleError::Limits)
}

fn integer(key: &str, text: &str) -> Result<i64, ThrottleError> {
    let wrong = || ThrottleError::NotAnInteger(key.to_owned());
    let number = read_number(key, text).map_err(|_| wrong())?;
    // A negative one has wrapped.
    let negative = text.trim_start().starts_with('-');
    match number.cast_signed() {
        number if negative == (number < 0) || number == 0 => Ok(number),
        _ => Err(wrong()),
    }
}

/// What an item limits.
enum Field {
    RequestSize,
    Rate { requests: bool, kind: Kind, part: Part },
}

enum Kind {
    Total,
    Read,
    Write,
}

enum Part {
    Average,
    Burst,
    BurstSeconds,
}

impl Field {
    /// The field called `name`, without the prefix.
    fn parse(name: &str) -> Option<Self> {
        if name == "iops-size" {
            return Some(Self::RequestSize);
        }
        let (unit, rest) = name.split_once('-')?;
        let (kind, part) = rest.split_once('-').unwrap_or((rest, ""));
        Some(Self::Rate {
            requests: match unit {
                "iops" => true,
                "bps" => false,
                _ => return None,
            },
            kind: match kind {
                "total" => Kind::Total,
                "read" => Kind::Read,
                "write" => Kind::Write,
                _ => return None,
            },
            part: match part {
                "" => Part::Average,
                "max" => Part::Burst,
                "max-length" => Part::BurstSeconds,
                _ => return None,
            },
        })
    }

    /// Sets the field. `grouped`: one of `limits`, where negative numbers are only too large.
    fn set(
        &self,
        limits: &mut ThrottleLimits,
        value: i64,
        key: &str,
        grouped: bool,
    ) -> Result<(), ThrottleError> {
        if value < 0 && !grouped {
            return Err(ThrottleError::Negative);
        }
        let value = value.cast_unsigned();
        let Self::Rate { requests, kind, part } = self else {
            limits.request_size = value;
            return Ok(());
        };
        let rates = if *requests { &mut limits.requests } else { &mut limits.bytes };
        let rate: &mut Rate = match kind {
            Kind::Total => &mut rates.total,
            Kind::Read => &mut rates.read,
            Kind::Write => &mut rates.write,
        };
        match part {
            Part::Average => rate.average = value,
            Part::Burst => rate.burst = value,
            Part::BurstSeconds if grouped && value > i64::MAX.cast_unsigned() => {
                // Any number above 1, as far as it goes.
                rate.burst_seconds = u64::from(u32::MAX);
            }
            Part::BurstSeconds if value > u64::from(u32::MAX) => {
                return Err(ThrottleError::TooManySeconds(key.to_owned()));
            }
            Part::BurstSeconds => rate.burst_seconds = value,
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn group(text: &str) -> Result<ThrottleGroup, ThrottleError> {
        throttle_group(&KeyValues::parse_pairs(text, Some("qom-type")).unwrap())
    }

    #[test]
    fn groups() {
        use ThrottleError as E;
        let limits = |text: &str| *group(text).unwrap().limits();
        let set = limits("throttle-group,id=a,limits.iops-total=30,x-iops-total=20,x-iops-size=0x10");
        assert_eq!((set.requests.total.average, set.request_size), (30, 16));
        let set = limits("throttle-group,id=a,x-bps-read=5,x-bps-read-max=9,x-bps-read-max-length=3");
        let read = set.bytes.read;
        assert_eq!((read.average, read.burst, read.burst_seconds), (5, 9, 3));
        for (text, expected) in [
            ("foo=1", E::Unexpected("foo".to_owned())),
            ("limits.foo=1", E::Unexpected("limits.foo".to_owned())),
            ("x-iops-total-min=1", E::Unexpected("x-iops-total-min".to_owned())),
            ("limits=1", E::NotAnObject),
            ("x-iops-total=1k", E::NotAnInteger("x-iops-total".to_owned())),
            ("x-iops-total=9999999999999999999", E::NotAnInteger("x-iops-total".to_owned())),
            ("x-iops-total=-1", E::Negative),
            ("limits.iops-total=-1", E::Limits(LimitError::TooLarge(1_000_000_000_000_000))),
            ("x-bps-total-max-length=4294967296", E::TooManySeconds("x-bps-total-max-length".to_owned())),
            ("limits.bps-total-max-length=-1", E::Limits(LimitError::BurstTimeWithoutRate)),
        ] {
            assert_eq!(group(text).unwrap_err(), expected, "{text}");
        }
    }
}
