//! The rules of `blkdebug`: from a file of groups, and from options.

use super::raw::size_option;
use crate::scalar::{OptionError, OptionErrorKind, read_switch};
use crate::tree::Options;
use qcow2_core::Event;
use qcow2_io::{DebugAction, DebugCall, DebugLimits, DebugRule, Injection, OsError, path_of};
use std::collections::BTreeMap;
use std::fmt;

/// Why rules are none.
#[derive(Debug)]
#[non_exhaustive]
pub enum RuleError {
    /// A limit for requests that is too large or does not go with another one.
    Limit {
        /// The option.
        option: &'static str,
        /// Its bytes.
        bytes: u64,
    },
    /// The file of rules cannot be read.
    Unreadable(OsError),
    /// A line of that file.
    Line {
        /// The file.
        file: String,
        /// Which line, from 1.
        line: usize,
        /// What is wrong with it.
        error: LineError,
    },
    /// An option that this driver does not have.
    UnknownOption(String),
    /// A key that a group of rules does not have.
    UnknownKey {
        /// The kind of the group.
        group: String,
        /// The key.
        key: String,
    },
    /// A rule does not say at which step.
    NoEvent,
    /// A value that its key does not take.
    Value(OptionError),
}

/// What is wrong with a line of a file of rules.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LineError {
    /// The head of a kind of group that is not known.
    UnknownGroup,
    /// It stands in no group.
    OutsideGroup,
    /// Not `name = "value"`.
    NotAPair,
}

impl fmt::Display for RuleError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Limit { option, bytes } => {
                write!(f, "the limit '{option}' cannot be {bytes} bytes: too large, or not aligned")
            }
            Self::Unreadable(error) => write!(f, "the file of rules cannot be read: {error}"),
            Self::Line { file, line, error } => {
                let what = match error {
                    LineError::UnknownGroup => "no such kind of rule",
                    LineError::OutsideGroup => "a value outside any rule",
                    LineError::NotAPair => "not of the form name = \"value\"",
                };
                write!(f, "line {line} of '{file}': {what}")
            }
            Self::UnknownOption(option) => write!(f, "the driver 'blkdebug' has no option '{option}'"),
            Self::UnknownKey { group, key } => write!(f, "a rule of kind '{group}' has no '{key}'"),
            Self::NoEvent => f.write_str("a rule does not name its event"),
            Self::Value(error) => error.fmt(f),
        }
    }
}

impl std::error::Error for RuleError {}

impl From<OptionError> for RuleError {
    fn from(error: OptionError) -> Self {
        Self::Value(error)
    }
}

/// The rules that `options` and the file that they name tell. Disk: reads that file.
pub(crate) fn rules(options: &Options) -> Result<Vec<DebugRule>, RuleError> {
    let mut groups = Vec::new();
    if let Some(name) = options.text("config") {
        let text = std::fs::read_to_string(path_of(&name))
            .map_err(|error| RuleError::Unreadable(OsError::new(error)))?;
        groups = groups_of(&name, &text)?;
    }
    for kind in ["inject-error", "set-state"] {
        let mut numbered: BTreeMap<u32, Group> = BTreeMap::new();
        for (key, value) in options.iter() {
            let inner = key.strip_prefix(kind).and_then(|rest| rest.strip_prefix('.'));
            let Some((number, name)) = inner.and_then(|inner| inner.split_once('.')) else { continue };
            let Ok(number) = number.parse() else {
                return Err(RuleError::UnknownOption(key.to_owned()));
            };
            let group = numbered.entry(number).or_insert_with(|| Group::new(kind));
            group.values.push((name.to_owned(), value.to_string()));
        }
        groups.extend(numbered.into_values());
    }
    groups.iter().map(Group::rule).collect()
}

/// The limits for requests that `options` tell.
pub(crate) fn limits(options: &Options) -> Result<DebugLimits, RuleError> {
    let size = |key| size_option(options, key).map(Option::unwrap_or_default);
    let mut limits = DebugLimits::default();
    limits.align = size("align")?;
    limits.max_transfer = size("max-transfer")?;
    limits.opt_write_zero = size("opt-write-zero")?;
    limits.max_write_zero = size("max-write-zero")?;
    limits.opt_discard = size("opt-discard")?;
    limits.max_discard = size("max-discard")?;
    match limits.unmet() {
        Some((option, bytes)) => Err(RuleError::Limit { option, bytes }),
        None => Ok(limits),
    }
}

struct Group {
    kind: String,
    values: Vec<(String, String)>,
}

/// `[kind]` lines, each followed by `name = "value"` lines.
fn groups_of(name: &str, text: &str) -> Result<Vec<Group>, RuleError> {
    let mut groups: Vec<Group> = Vec::new();
    for (number, line) in (1..).zip(text.lines()) {
        let wrong = |error| Err(RuleError::Line { file: name.to_owned(), line: number, error });
        let line = line.trim();
        if line.is_empty() || line.starts_with('#') {
            continue;
        }
        if let Some(kind) = line.strip_prefix('[').and_then(|rest| rest.strip_suffix(']')) {
            // A second word is an identifier, which rules do not need.
            let kind = kind.split_whitespace().next().unwrap_or_default();
            if !["inject-error", "set-state"].contains(&kind) {
                return wrong(LineError::UnknownGroup);
            }
            groups.push(Group::new(kind));
            continue;
        }
        let value = line.split_once('=').and_then(|(key, value)| {
            Some((key.trim().to_owned(), value.trim().strip_prefix('"')?.strip_suffix('"')?.to_owned()))
        });
        match (value, groups.last_mut()) {
            (Some(value), Some(group)) => group.values.push(value),
            (Some(_), None) => return wrong(LineError::OutsideGroup),
            (None, _) => return wrong(LineError::NotAPair),
        }
    }
    Ok(groups)
}

impl Group {
    fn new(kind: &str) -> Self {
        Self { kind: kind.to_owned(), values: Vec::new() }
    }

    fn get(&self, key: &str) -> Option<&str> {
        self.values.iter().rev().find(|(name, _)| name == key).map(|(_, value)| &**value)
    }

    fn number(&self, key: &str) -> Result<Option<i64>, OptionError> {
        let wrong = |text: &str| OptionError::new(key, text, OptionErrorKind::NotANumber);
        let parse = |text: &str| text.parse().map_err(|_| wrong(text));
        self.get(key).map(parse).transpose()
    }

    fn switch(&self, key: &str) -> Result<bool, OptionError> {
        self.get(key).map_or(Ok(false), |text| read_switch(key, text))
    }

    fn rule(&self) -> Result<DebugRule, RuleError> {
        let known: &[&str] = match &*self.kind {
            "set-state" => &["event", "state", "new_state"],
            _ => &["event", "state", "iotype", "errno", "sector", "once", "immediately"],
        };
        if let Some((key, _)) = self.values.iter().find(|(key, _)| !known.contains(&&**key)) {
            return Err(RuleError::UnknownKey { group: self.kind.clone(), key: key.clone() });
        }
        let name = self.get("event").ok_or(RuleError::NoEvent)?;
        let event = Event::parse(name).ok_or_else(|| not_a_choice("event", name))?;
        let action = match &*self.kind {
            "set-state" => DebugAction::SetState(self.number("new_state")?.unwrap_or(0)),
            _ => DebugAction::Fail(self.injection()?),
        };
        let mut rule = DebugRule::new(event, action);
        rule.state = self.number("state")?.unwrap_or(0);
        Ok(rule)
    }

    fn injection(&self) -> Result<Injection, RuleError> {
        let mut injection = Injection::default();
        if let Some(errno) = self.number("errno")? {
            injection.errno = i32::try_from(errno).map_err(|_| not_a_choice("errno", &errno.to_string()))?;
        }
        let sector = self.number("sector")?.and_then(|sector| u64::try_from(sector).ok());
        injection.offset = sector.and_then(|sector| sector.checked_mul(512));
        injection.once = self.switch("once")?;
        // Requests that fail at once and those that fail later are one here.
        self.switch("immediately")?;
        if let Some(kind) = self.get("iotype") {
            injection.calls = vec![match kind {
                "read" => DebugCall::Read,
                "write" => DebugCall::Write,
                "write-zeroes" => DebugCall::WriteZeroes,
                "discard" => DebugCall::Discard,
                "flush" => DebugCall::Flush,
                "block-status" => DebugCall::Extent,
                other => return Err(not_a_choice("iotype", other).into()),
            }];
        }
        Ok(injection)
    }
}

fn not_a_choice(key: &str, value: &str) -> OptionError {
    OptionError::new(key, value, OptionErrorKind::NotAChoice)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_of_rules() {
        let text = "# first\n[inject-error]\nevent = \"l2_load\"\nerrno = \"28\"\nonce = \"on\"\n\
                    sector = \"3\"\n\n\
                    [set-state]\nevent = \"read_aio\"\nstate = \"1\"\nnew_state = \"2\"\n";
        let rules: Vec<DebugRule> =
            groups_of("x", text).unwrap().iter().map(|group| group.rule().unwrap()).collect();
        let mut injection = Injection::default();
        (injection.errno, injection.once, injection.offset) = (28, true, Some(1536));
        let mut second = DebugRule::new(Event::ReadAio, DebugAction::SetState(2));
        second.state = 1;
        assert_eq!(rules, [DebugRule::new(Event::L2Load, DebugAction::Fail(injection)), second]);
        for (text, why) in [
            ("[foo]", (1, LineError::UnknownGroup)),
            ("a = \"b\"", (1, LineError::OutsideGroup)),
            ("[set-state]\nwhat", (2, LineError::NotAPair)),
        ] {
            let Err(RuleError::Line { line, error, .. }) = groups_of("x", text).map(drop) else {
                panic!("{text} is taken");
            };
            assert_eq!((line, error), why);
        }
    }
}
