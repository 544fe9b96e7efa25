//! The text that defines an object, as a list of `key=value` or as JSON, and help for who asks for it.

use crate::keyvalue::{KeyValueError, KeyValues};
use crate::tree::{JsonError, parse_json};
use serde_json::Value;
use std::fmt::Write;

/// Why a text has no items that define something.
pub(super) enum NoItems {
    /// It is empty.
    Empty,
    /// It asks for help, which is this.
    Help(String),
    Syntax(KeyValueError),
    Json(JsonError),
    /// An item, and the type that its value is not of.
    WrongType(String, &'static str),
}

/// The items that `text` has. Errors: it asks for help, and the error has it; it has no such items.
pub(super) fn items(text: &str) -> Result<KeyValues, NoItems> {
    if is_json(text) {
        return from_json(text);
    }
    if text.is_empty() {
        return Err(NoItems::Empty);
    }
    let list = KeyValues::parse_pairs_or_help(text, Some("qom-type")).map_err(NoItems::Syntax)?;
    if list.asks_help() {
        return Err(NoItems::Help(help(list.last("qom-type"))));
    }
    Ok(list)
}

/// What can be said of a kind of object, of all kinds where there is no such kind.
fn help(kind: Option<&str>) -> String {
    let (mut text, known) = (String::new(), KINDS.iter().find(|(name, _)| Some(*name) == kind));
    // Writing to text cannot fail.
    let _ = match known {
        Some((name, items)) => {
            let told = items.iter().filter(|(item, ..)| !item.contains('.'));
            writeln!(text, "{name} options:").and_then(|()| {
                told.clone().try_for_each(|(item, _, shown)| writeln!(text, "  {item}=<{shown}>"))
            })
        }
        None => writeln!(text, "List of user creatable objects:")
            .and_then(|()| KINDS.iter().try_for_each(|(name, _)| writeln!(text, "  {name}"))),
    };
    text
}

fn from_json(text: &str) -> Result<KeyValues, NoItems> {
    let value = parse_json(text).map_err(NoItems::Json)?;
    let Value::Object(fields) = &value else { return Err(NoItems::Json(JsonError::NotAnObject)) };
    let mut list = KeyValues::default();
    let kind = match fields.get("qom-type") {
        Some(Value::String(kind)) => &**kind,
        Some(_) => return Err(NoItems::WrongType("qom-type".to_owned(), "string")),
        None => "",
    };
    for (key, value) in fields {
        flatten(kind, key, value, &mut list)?;
    }
    Ok(list)
}

/// Adds a field, and those in it, under keys with dots. The parser bounds how deep they stand in one another.
fn flatten(kind: &str, key: &str, value: &Value, list: &mut KeyValues) -> Result<(), NoItems> {
    let text = match (type_of(kind, key), value) {
        (Type::Object, Value::Object(fields)) => {
            return fields
                .iter()
                .try_for_each(|(name, value)| flatten(kind, &format!("{key}.{name}"), value, list));
        }
        (Type::Array, Value::Array(values)) => {
            return (0..)
                .zip(values)
                .try_for_each(|(number, value)| flatten(kind, &format!("{key}.{number}"), value, list));
        }
        (Type::Text, Value::String(text)) => text.clone(),
        (Type::Integer, Value::Number(number)) if !number.is_f64() => number.to_string(),
        (Type::Switch, Value::Bool(on)) => if *on { "on" } else { "off" }.to_owned(),
        // It is refused for its key, whatever its value is.
        (Type::Unknown, _) => String::new(),
        (wanted, _) => return Err(NoItems::WrongType(in_brackets(key), wanted.name())),
    };
    list.push(key, &text);
    Ok(())
}

/// A key as QEMU shows it for JSON: `rules[0].match` where a list of `key=value` has `rules.0.match`.
fn in_brackets(key: &str) -> String {
    let is_number = |part: &str| !part.is_empty() && part.bytes().all(|byte| byte.is_ascii_digit());
    let mut parts = key.split('.');
    let first = parts.next().unwrap_or_default().to_owned();
    parts.fold(first, |shown, part| match is_number(part) {
        true => format!("{shown}[{part}]"),
        false => format!("{shown}.{part}"),
    })
}

/// A key of what `text` defines as it is shown for such a text.
pub(super) fn key_shown(text: &str, key: String) -> String {
    if is_json(text) { in_brackets(&key) } else { key }
}

fn is_json(text: &str) -> bool {
    text.starts_with('{')
}

/// What the value of an item is in JSON.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Type {
    Text,
    Integer,
    Switch,
    Object,
    Array,
    /// There is no such item.
    Unknown,
}

impl Type {
    fn name(self) -> &'static str {
        match self {
            Self::Text | Self::Unknown => "string",
            Self::Integer => "integer",
            Self::Switch => "boolean",
            Self::Object => "object",
            Self::Array => "array",
        }
    }
}

fn type_of(kind: &str, key: &str) -> Type {
    let items = KINDS.iter().find(|(name, _)| *name == kind).map_or(&[][..], |(_, items)| items);
    let exactly = items.iter().find(|(item, ..)| *item == key);
    match (exactly, key.split_once('.')) {
        (Some((_, kind, _)), _) => *kind,
        (None, Some(("limits", _))) if kind == "throttle-group" => Type::Integer,
        (None, Some(("rules", rest))) if kind == "authz-list" => match rest.split_once('.') {
            None => Type::Object,
            Some((_, "match" | "policy" | "format")) => Type::Text,
            Some(_) => Type::Unknown,
        },
        (None, None) if matches!(key, "qom-type" | "id") => Type::Text,
        _ => Type::Unknown,
    }
}

/// An item of a kind: its name, what it is in JSON, and how the help shows that.
type Item = (&'static str, Type, &'static str);

/// The kinds that can be defined, and their items, in the order of QEMU's help.
const KINDS: &[(&str, &[Item])] = &[
    ("authz-list", &[("policy", Type::Text, "QAuthZListPolicy"), ("rules", Type::Array, "QAuthZListRule")]),
    ("authz-simple", &[("identity", Type::Text, "string")]),
    (
        "secret",
        &[
            ("data", Type::Text, "string"),
            ("file", Type::Text, "string"),
            ("format", Type::Text, "QCryptoSecretFormat"),
            ("iv", Type::Text, "string"),
            ("keyid", Type::Text, "string"),
        ],
    ),
    (
        "throttle-group",
        &[
            ("limits", Type::Object, "ThrottleLimits"),
            ("x-bps-read-max-length", Type::Integer, "int"),
            ("x-bps-read-max", Type::Integer, "int"),
            ("x-bps-read", Type::Integer, "int"),
            ("x-bps-total-max-length", Type::Integer, "int"),
            ("x-bps-total-max", Type::Integer, "int"),
            ("x-bps-total", Type::Integer, "int"),
            ("x-bps-write-max-length", Type::Integer, "int"),
            ("x-bps-write-max", Type::Integer, "int"),
            ("x-bps-write", Type::Integer, "int"),
            ("x-iops-read-max-length", Type::Integer, "int"),
            ("x-iops-read-max", Type::Integer, "int"),
            ("x-iops-read", Type::Integer, "int"),
            ("x-iops-size", Type::Integer, "int"),
            ("x-iops-total-max-length", Type::Integer, "int"),
            ("x-iops-total-max", Type::Integer, "int"),
            ("x-iops-total", Type::Integer, "int"),
            ("x-iops-write-max-length", Type::Integer, "int"),
            ("x-iops-write-max", Type::Integer, "int"),
            ("x-iops-write", Type::Integer, "int"),
        ],
    ),
    (
        "tls-creds-x509",
        &[
            ("dir", Type::Text, "string"),
            ("endpoint", Type::Text, "QCryptoTLSCredsEndpoint"),
            ("passwordid", Type::Text, "string"),
            ("priority", Type::Text, "string"),
            ("sanity-check", Type::Switch, "bool"),
            ("verify-peer", Type::Switch, "bool"),
        ],
    ),
];

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test may stop")]
mod tests {
    use super::super::Secrets;
    use super::*;

    #[track_caller]
    fn check(text: &str, expected: &str) {
        let seen = Secrets::default().define(text).map_err(|error| error.to_string());
        assert_eq!(seen.err().unwrap_or_default(), expected, "{text}");
    }

    #[test]
    fn objects_in_json() {
        check(r#"{"qom-type":"secret","id":"a","data":"x"}"#, "");
        check("{'qom-type':'secret','id':'a','data':'x'}", "");
        check(r#"{"qom-type":"throttle-group","id":"a","limits":{"iops-total":5}}"#, "");
        check(r#"{"qom-type":"throttle-group","id":"a","x-iops-total":5}"#, "");
        check(r#"{"qom-type":"authz-list","id":"a","rules":[{"match":"x","policy":"allow"}]}"#, "");
        let wrong = |key: &str, kind: &str| format!("the value of '{key}' is not of the type {kind}");
        check(r#"{"qom-type":"secret","id":"a","data":1}"#, &wrong("data", "string"));
        check(r#"{"qom-type":"secret","id":"a","data":{"b":1}}"#, &wrong("data", "string"));
        check(r#"{"qom-type":1,"id":"a"}"#, &wrong("qom-type", "string"));
        check(r#"{"qom-type":"authz-list","id":"a","rules":{}}"#, &wrong("rules", "array"));
        check(
            r#"{"qom-type":"throttle-group","id":"a","x-iops-total":"5"}"#,
            &wrong("x-iops-total", "integer"),
        );
        check(
            r#"{"qom-type":"tls-creds-x509","id":"a","verify-peer":"no"}"#,
            &wrong("verify-peer", "boolean"),
        );
        check(r#"{"qom-type":"secret","id":"a","data":"x","foo":1}"#, "a secret has no 'foo'");
        let list = |rule: &str| format!(r#"{{"qom-type":"authz-list","id":"a","rules":[{rule}]}}"#);
        check(&list("5"), &wrong("rules[0]", "object"));
        check(&list(r#"{"match":"x"}"#), "Parameter 'rules[0].policy' is missing");
        let rule = r#"{"match":"x","policy":"allow","foo":1}"#;
        check(&list(rule), "Parameter 'rules[0].foo' is unexpected");
        check("", "the definition lacks 'qom-type'");
        check(r#"{"id":"a"}"#, "the definition lacks 'qom-type'");
        check("{", "the value does not end");
        check("{} x", "there is more than one value");
    }

    #[test]
    fn a_value_in_json_keeps_its_commas() {
        let mut secrets = Secrets::default();
        secrets.define(r#"{"qom-type":"secret","id":"a","data":"x,,y,z=1"}"#).unwrap();
        assert_eq!(secrets.secret("a").unwrap().bytes(), b"x,,y,z=1");
    }

    #[test]
    fn help_for_who_asks() {
        let all = "List of user creatable objects:\n  authz-list\n  authz-simple\n  secret\n  \
                   throttle-group\n  tls-creds-x509\n";
        for text in ["help", "?", "help,id=a", "id=a,help", "help,", "foo,help"] {
            check(text, all);
        }
        let one = "authz-list options:\n  policy=<QAuthZListPolicy>\n  rules=<QAuthZListRule>\n";
        for text in ["authz-list,help", "authz-list,?,id=a", "qom-type=authz-list,help"] {
            check(text, one);
        }
        check("secret,foo,help", "'foo' has no value");
        check(
            "qom-type=help",
            "'help' is not a kind of object (secret, throttle-group, tls-creds-x509, authz-list)",
        );
        check("secret,help=on", "the definition lacks 'id'");
    }

    /// An item that an object takes is one that its help and its JSON know.
    #[test]
    fn the_table_has_every_item() {
        for (kind, items) in KINDS {
            let shown = help(Some(kind));
            assert_eq!(shown.lines().count(), items.len() + 1);
            for (item, wanted, _) in *items {
                assert_eq!(type_of(kind, item), *wanted);
            }
        }
    }
}
