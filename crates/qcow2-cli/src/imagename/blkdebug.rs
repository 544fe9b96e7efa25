//! The rules of `blkdebug`: from a file of groups, and from options.

use super::options::Options;
use crate::imageopts::parse_switch;
use qcow2_core::Event;
use qcow2_io::{DebugAction, DebugCall, DebugRule, Injection, OsError};
use std::collections::BTreeMap;

/// The rules that `options` and the file that they name tell. Errors: the reason.
pub(crate) fn rules(options: &Options) -> Result<Vec<DebugRule>, String> {
    if let Some(align) = options.text("align")
        && !align.parse::<u64>().is_ok_and(u64::is_power_of_two)
    {
        return Err(format!("Cannot meet constraints with align {align}"));
    }
    let mut groups = Vec::new();
    if let Some(name) = options.text("config") {
        let text = std::fs::read_to_string(&name)
            .map_err(|error| format!("Could not read blkdebug config file: {}", OsError::new(error)))?;
        groups = groups_of(&name, &text)?;
    }
    for kind in ["inject-error", "set-state"] {
        let mut numbered: BTreeMap<u32, Group> = BTreeMap::new();
        for (key, value) in options.iter() {
            let inner = key.strip_prefix(kind).and_then(|rest| rest.strip_prefix('.'));
            let Some((number, name)) = inner.and_then(|inner| inner.split_once('.')) else { continue };
            let Ok(number) = number.parse() else {
                return Err(format!("Block protocol 'blkdebug' doesn't support the option '{key}'"));
            };
            let group = numbered.entry(number).or_insert_with(|| Group::new(kind));
            group.values.push((name.to_owned(), plain(value)));
        }
        groups.extend(numbered.into_values());
    }
    groups.iter().map(Group::rule).collect()
}

fn plain(value: &serde_json::Value) -> String {
    value.as_str().map_or_else(|| value.to_string(), str::to_owned)
}

struct Group {
    kind: String,
    values: Vec<(String, String)>,
}

/// `[kind]` lines, each followed by `name = "value"` lines.
fn groups_of(name: &str, text: &str) -> Result<Vec<Group>, String> {
    let mut groups: Vec<Group> = Vec::new();
    for (number, line) in (1..).zip(text.lines()) {
        let wrong = |what: &str| Err(format!("{name}:{number}: {what}"));
        let line = line.trim();
        if line.is_empty() || line.starts_with('#') {
            continue;
        }
        if let Some(kind) = line.strip_prefix('[').and_then(|rest| rest.strip_suffix(']')) {
            // A second word is an identifier, which rules do not need.
            let kind = kind.split_whitespace().next().unwrap_or_default();
            if !["inject-error", "set-state"].contains(&kind) {
                return wrong("There is no such group");
            }
            groups.push(Group::new(kind));
            continue;
        }
        let value = line.split_once('=').and_then(|(key, value)| {
            Some((key.trim().to_owned(), value.trim().strip_prefix('"')?.strip_suffix('"')?.to_owned()))
        });
        match (value, groups.last_mut()) {
            (Some(value), Some(group)) => group.values.push(value),
            (Some(_), None) => return wrong("no group defined"),
            (None, _) => return wrong("parse error"),
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

    fn number(&self, key: &str) -> Result<Option<i64>, String> {
        let parse = |text: &str| text.parse().map_err(|_| format!("Parameter '{key}' expects a number"));
        self.get(key).map(parse).transpose()
    }

    fn switch(&self, key: &str) -> Result<bool, String> {
        let wrong = || format!("Parameter '{key}' expects 'on' or 'off'");
        self.get(key).map_or(Ok(false), |text| parse_switch(text).ok_or_else(wrong))
    }

    fn rule(&self) -> Result<DebugRule, String> {
        let known: &[&str] = match &*self.kind {
            "set-state" => &["event", "state", "new_state"],
            _ => &["event", "state", "iotype", "errno", "sector", "once", "immediately"],
        };
        if let Some((key, _)) = self.values.iter().find(|(key, _)| !known.contains(&&**key)) {
            return Err(format!("[{}] section doesn't support the option '{key}'", self.kind));
        }
        let name = self.get("event").ok_or("Missing event name for rule")?;
        let event = Event::parse(name).ok_or_else(|| format!("invalid parameter value: {name}"))?;
        let action = match &*self.kind {
            "set-state" => DebugAction::SetState(self.number("new_state")?.unwrap_or(0)),
            _ => DebugAction::Fail(self.injection()?),
        };
        let mut rule = DebugRule::new(event, action);
        rule.state = self.number("state")?.unwrap_or(0);
        Ok(rule)
    }

    fn injection(&self) -> Result<Injection, String> {
        let mut injection = Injection::default();
        if let Some(errno) = self.number("errno")? {
            injection.errno =
                i32::try_from(errno).map_err(|_| format!("invalid parameter value: {errno}"))?;
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
                other => return Err(format!("invalid parameter value: {other}")),
            }];
        }
        Ok(injection)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_of_rules() {
        let text = "# first\n[inject-error]\nevent = \"l2_load\"\nerrno = \"28\"\nonce = \"on\"\nsector = \"3\"\n\n\
                    [set-state]\nevent = \"read_aio\"\nstate = \"1\"\nnew_state = \"2\"\n";
        let rules: Vec<DebugRule> =
            groups_of("x", text).unwrap().iter().map(|group| group.rule().unwrap()).collect();
        let mut injection = Injection::default();
        (injection.errno, injection.once, injection.offset) = (28, true, Some(1536));
        let mut second = DebugRule::new(Event::ReadAio, DebugAction::SetState(2));
        second.state = 1;
        assert_eq!(rules, [DebugRule::new(Event::L2Load, DebugAction::Fail(injection)), second]);
        for (text, why) in [
            ("[foo]", "x:1: There is no such group"),
            ("a = \"b\"", "x:1: no group defined"),
            ("[set-state]\nwhat", "x:2: parse error"),
        ] {
            assert_eq!(groups_of("x", text).err().as_deref(), Some(why));
        }
    }
}
