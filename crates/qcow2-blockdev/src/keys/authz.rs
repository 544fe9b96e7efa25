//! Who may connect, by the name in a certificate: `authz-simple,id=NAME,identity=SUBJECT` and `authz-list`.

use super::object::key_shown;
use super::secrets::SecretError;
use crate::keyvalue::KeyValues;
use std::collections::BTreeMap;
use std::fmt;

/// Decides by names.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Authorization {
    rules: Vec<Rule>,
    /// What holds for a name that no rule is about.
    otherwise: bool,
}

#[derive(Clone, Debug, PartialEq, Eq)]
struct Rule {
    pattern: String,
    /// `*` and `?` in the pattern stand for other characters.
    is_glob: bool,
    allows: bool,
}

/// Why a text defines no authorization. `Display` uses QEMU's text.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum AuthorizationError {
    /// An item that there must be.
    Missing(String),
    /// No rule has this number, and there are rules with higher ones.
    Gap(usize),
    /// The item does not take this value.
    Value {
        /// The item.
        key: &'static str,
        /// Its value.
        value: String,
    },
    /// `rules` with a value of its own.
    NotAnArray,
    /// An item that is not known.
    Unexpected(String),
}

impl fmt::Display for AuthorizationError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Missing(key) => write!(f, "Parameter '{key}' is missing"),
            Self::Gap(number) => write!(f, "Parameter 'rules.{number}' missing"),
            Self::Value { key, value } => write!(f, "Parameter '{key}' does not accept value '{value}'"),
            Self::NotAnArray => f.write_str("Invalid parameter type for 'rules', expected: array"),
            Self::Unexpected(key) => write!(f, "Parameter '{key}' is unexpected"),
        }
    }
}

impl std::error::Error for AuthorizationError {}

impl Authorization {
    /// Whether somebody with this name may connect. The first rule that is about it decides.
    pub fn allows(&self, name: &str) -> bool {
        let rule = self.rules.iter().find(|rule| match rule.is_glob {
            true => matches(&rule.pattern, name),
            false => rule.pattern == name,
        });
        rule.map_or(self.otherwise, |rule| rule.allows)
    }

    /// The object that `list` defines, whose `qom-type` begins with `authz-`.
    /// `text`: where it comes from.
    pub(super) fn define(kind: &str, list: &KeyValues, text: &str) -> Result<Self, SecretError> {
        let defined = match kind {
            "authz-simple" => Self::simple(list),
            "authz-list" => Self::list(list),
            _ => return Err(SecretError::UnknownType(kind.to_owned())),
        };
        Ok(defined.map_err(|error| match error {
            AuthorizationError::Missing(key) => AuthorizationError::Missing(key_shown(text, key)),
            AuthorizationError::Unexpected(key) => AuthorizationError::Unexpected(key_shown(text, key)),
            error => error,
        })?)
    }

    fn simple(list: &KeyValues) -> Result<Self, AuthorizationError> {
        let missing = || AuthorizationError::Missing("identity".to_owned());
        let pattern = list.last("identity").ok_or_else(missing)?.to_owned();
        let known = |key: &str| matches!(key, "qom-type" | "id" | "identity");
        if let Some(pair) = list.pairs().iter().find(|pair| !known(&pair.key)) {
            return Err(AuthorizationError::Unexpected(pair.key.clone()));
        }
        Ok(Self { rules: vec![Rule { pattern, is_glob: false, allows: true }], otherwise: false })
    }

    fn list(list: &KeyValues) -> Result<Self, AuthorizationError> {
        let otherwise = list.last("policy").map(policy).transpose()?.unwrap_or(false);
        let mut rules: BTreeMap<usize, BTreeMap<&str, &str>> = BTreeMap::new();
        for pair in list.pairs() {
            let item = pair.key.strip_prefix("rules.").and_then(|rest| rest.split_once('.'));
            match (item.map(|(number, part)| (number.parse(), part)), &*pair.key) {
                (Some((Ok(number), part)), _) => {
                    rules.entry(number).or_default().insert(part, &pair.value);
                }
                (None, "rules") => return Err(AuthorizationError::NotAnArray),
                (None, "qom-type" | "id" | "policy") => {}
                _ => return Err(AuthorizationError::Unexpected(pair.key.clone())),
            }
        }
        let gap = rules.keys().zip(0..).find(|(number, expected)| *number != expected);
        if let Some((_, expected)) = gap {
            return Err(AuthorizationError::Gap(expected));
        }
        let rules = rules.iter().map(|(number, parts)| rule(*number, parts));
        Ok(Self { rules: rules.collect::<Result<_, _>>()?, otherwise })
    }
}

fn rule(number: usize, parts: &BTreeMap<&str, &str>) -> Result<Rule, AuthorizationError> {
    let key = |part: &str| format!("rules.{number}.{part}");
    let wanted = |part: &str| parts.get(part).ok_or_else(|| AuthorizationError::Missing(key(part)));
    let pattern = (*wanted("match")?).to_owned();
    let allows = policy(wanted("policy")?)?;
    let is_glob = match parts.get("format") {
        None | Some(&"exact") => false,
        Some(&"glob") => true,
        Some(other) => return Err(AuthorizationError::Value { key: "format", value: (*other).to_owned() }),
    };
    match parts.keys().find(|part| !matches!(**part, "match" | "policy" | "format")) {
        Some(part) => Err(AuthorizationError::Unexpected(key(part))),
        None => Ok(Rule { pattern, is_glob, allows }),
    }
}

fn policy(value: &str) -> Result<bool, AuthorizationError> {
    match value {
        "allow" => Ok(true),
        "deny" => Ok(false),
        other => Err(AuthorizationError::Value { key: "policy", value: other.to_owned() }),
    }
}

/// Whether `*` (any characters) and `?` (one) of the pattern can stand for what is in the name. Takes at most
/// the product of both lengths.
fn matches(pattern: &str, name: &str) -> bool {
    let (pattern, name): (Vec<char>, Vec<char>) = (pattern.chars().collect(), name.chars().collect());
    let (mut at, mut seen) = (0, 0);
    // Behind the last star, and how far the name had come there.
    let mut star = None;
    while seen < name.len() {
        match pattern.get(at) {
            Some('*') => {
                at += 1;
                star = Some((at, seen));
            }
            Some(c) if *c == '?' || *c == name[seen] => (at, seen) = (at + 1, seen + 1),
            _ => {
                // The star takes one character more.
                let Some((behind, from)) = star else { return false };
                (at, seen, star) = (behind, from + 1, Some((behind, from + 1)));
            }
        }
    }
    pattern[at..].iter().all(|c| *c == '*')
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test may stop")]
mod tests {
    use super::super::Secrets;

    #[track_caller]
    fn check(text: &str, allowed: &[&str], denied: &[&str]) {
        let mut objects = Secrets::default();
        objects.define(text).unwrap();
        let authorization = objects.authorization("a").unwrap();
        allowed.iter().for_each(|name| assert!(authorization.allows(name), "{text}: {name}"));
        denied.iter().for_each(|name| assert!(!authorization.allows(name), "{text}: {name}"));
    }

    #[test]
    fn who_is_allowed() {
        check("authz-simple,id=a,identity=CN=x,,O=y", &["CN=x,O=y"], &["CN=x", "", "CN=x,O=yy"]);
        check("authz-list,id=a", &[], &["", "x"]);
        check("authz-list,id=a,policy=allow", &["", "x"], &[]);
        let rules = "rules.0.match=bad*,rules.0.policy=deny,rules.0.format=glob,rules.1.match=b?d*,\
                     rules.1.policy=allow,rules.1.format=glob,rules.2.match=*,rules.2.policy=allow";
        check(&format!("authz-list,id=a,{rules}"), &["bid", "b\u{e9}dx", "*"], &["bad", "badge", "bd", "x"]);
        let globs = [("*a*b", "xaxxabb", "xaxxabc"), ("**", "", "\0"), ("a*a", "aa", "a"), ("?", "x", "xx")];
        for (pattern, yes, no) in globs {
            assert!(super::matches(pattern, yes), "{pattern} {yes}");
            assert!(pattern == "**" || !super::matches(pattern, no), "{pattern} {no}");
        }
    }

    /// In QEMU's words.
    #[test]
    fn what_defines_nothing() {
        for (text, expected) in [
            ("authz-simple,id=a", "Parameter 'identity' is missing"),
            ("authz-simple,id=a,identity=x,foo=y", "Parameter 'foo' is unexpected"),
            ("authz-list,id=a,policy=foo", "Parameter 'policy' does not accept value 'foo'"),
            ("authz-list,id=a,rules=x", "Invalid parameter type for 'rules', expected: array"),
            ("authz-list,id=a,rules.0.match=x", "Parameter 'rules.0.policy' is missing"),
            ("authz-list,id=a,rules.0.policy=deny", "Parameter 'rules.0.match' is missing"),
            ("authz-list,id=a,rules.1.match=x,rules.1.policy=deny", "Parameter 'rules.0' missing"),
            (
                "authz-list,id=a,rules.0.match=x,rules.0.policy=deny,rules.0.format=foo",
                "Parameter 'format' does not accept value 'foo'",
            ),
            (
                "authz-list,id=a,rules.0.match=x,rules.0.policy=deny,rules.0.foo=y",
                "Parameter 'rules.0.foo' is unexpected",
            ),
        ] {
            assert_eq!(Secrets::default().define(text).unwrap_err().to_string(), expected, "{text}");
        }
    }
}
