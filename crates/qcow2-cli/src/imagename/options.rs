//! A name's options, flat: `{"a": {"b": 1}}` is `a.b=1`, as option strings have it.

use super::jsontext;
use crate::optlist::OptList;
use serde_json::Value;

/// Dotted keys and their values, in the order in which they came.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Options(Vec<(String, Value)>);

impl Options {
    /// Reads an option string; adds to `warnings`. Errors: the message.
    pub(super) fn from_string(text: &str, warnings: &mut Vec<String>) -> Result<Self, String> {
        let mut options = Self::default();
        let (list, new) = OptList::parse_name(text)?;
        warnings.extend(new);
        for pair in list.pairs() {
            options.set(&pair.key, Value::String(pair.value.clone()));
        }
        Ok(options)
    }

    /// What an option string without a `=` names: all up to the first lone comma.
    pub(super) fn lone_name(text: &str) -> String {
        crate::optlist::first_item(text)
    }

    /// Reads what follows `json:`. Errors: the message.
    pub(super) fn from_json(text: &str) -> Result<Self, String> {
        let value =
            jsontext::parse(text).map_err(|why| format!("Could not parse the JSON options: {why}"))?;
        if !value.is_object() {
            return Err("Invalid JSON object given".to_owned());
        }
        let mut options = Self::default();
        options.flatten("", value);
        Ok(options)
    }

    fn flatten(&mut self, prefix: &str, value: Value) {
        let name = |key: &str| if prefix.is_empty() { key.to_owned() } else { format!("{prefix}.{key}") };
        match value {
            Value::Object(fields) => {
                fields.into_iter().for_each(|(key, item)| self.flatten(&name(&key), item))
            }
            Value::Array(items) => {
                items.into_iter().enumerate().for_each(|(i, item)| self.flatten(&name(&i.to_string()), item));
            }
            scalar => self.set(prefix, scalar),
        }
    }

    /// Sets an option; the last one counts.
    pub(super) fn set(&mut self, key: &str, value: Value) {
        self.0.retain(|(known, _)| known != key);
        self.0.push((key.to_owned(), value));
    }

    /// Takes an option out.
    pub(super) fn take(&mut self, key: &str) -> Option<Value> {
        let index = self.0.iter().position(|(known, _)| known == key)?;
        Some(self.0.remove(index).1)
    }

    /// Takes a text out; another kind of value counts as none.
    pub(super) fn take_text(&mut self, key: &str) -> Option<String> {
        match self.take(key) {
            Some(Value::String(text)) => Some(text),
            _ => None,
        }
    }

    /// Takes the options out that begin with `prefix.`, without it.
    pub(super) fn take_group(&mut self, prefix: &str) -> Self {
        let mut group = Self::default();
        self.0.retain(|(key, value)| {
            let inner = key.strip_prefix(prefix).and_then(|rest| rest.strip_prefix('.'));
            if let Some(inner) = inner {
                group.0.push((inner.to_owned(), value.clone()));
            }
            inner.is_none()
        });
        group
    }

    /// The value of an option as text, whatever its kind.
    pub(crate) fn text(&self, key: &str) -> Option<String> {
        self.0.iter().find(|(known, _)| known == key).map(|(_, value)| plain(value))
    }

    /// All options in order.
    pub(crate) fn iter(&self) -> impl Iterator<Item = (&str, &Value)> {
        self.0.iter().map(|(key, value)| (&**key, value))
    }

    /// Whether there are none.
    pub(crate) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

fn plain(value: &Value) -> String {
    match value {
        Value::String(text) => text.clone(),
        Value::Bool(true) => "on".to_owned(),
        Value::Bool(false) => "off".to_owned(),
        other => other.to_string(),
    }
}
