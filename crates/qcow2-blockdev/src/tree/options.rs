//! A name's options, flat: `{"a": {"b": 1}}` is `a.b=1`, as option strings have it.

use super::json::{self, JsonError};
use super::scalar::Scalar;
use crate::keyvalue::{self, KeyValueError, KeyValues, ShortForm};
use serde_json::Value;

/// Dotted keys and their values, in the order in which they came.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Options(Vec<(String, Scalar)>);

impl Options {
    /// Reads an option string. With the options come the switches that were given without a value.
    pub fn from_list(text: &str) -> Result<(Self, Vec<ShortForm>), KeyValueError> {
        let mut options = Self::default();
        let (list, short) = KeyValues::parse_name(text)?;
        for pair in list.pairs() {
            options.set(&pair.key, Scalar::Text(pair.value.clone()));
        }
        Ok((options, short))
    }

    /// What an option string without a `=` names: all up to the first lone comma.
    pub(crate) fn lone_name(text: &str) -> String {
        keyvalue::first_item(text)
    }

    /// Reads what follows `json:`, one object.
    pub fn from_json(text: &str) -> Result<Self, JsonError> {
        let value = json::parse(text)?;
        if !value.is_object() {
            return Err(JsonError::NotAnObject);
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
            Value::Null => self.set(prefix, Scalar::Null),
            Value::Bool(on) => self.set(prefix, Scalar::Switch(on)),
            Value::Number(number) => self.set(prefix, Scalar::Number(number.to_string())),
            Value::String(text) => self.set(prefix, Scalar::Text(text)),
        }
    }

    /// Sets an option; the last one counts.
    pub fn set(&mut self, key: &str, value: Scalar) {
        self.0.retain(|(known, _)| known != key);
        self.0.push((key.to_owned(), value));
    }

    /// Adds those of `others` that are not set here.
    pub(crate) fn add_missing(&mut self, others: Self) {
        let missing = others.0.into_iter().filter(|(key, _)| !self.has(key)).collect::<Vec<_>>();
        self.0.extend(missing);
    }

    /// Whether an option is set.
    pub(crate) fn has(&self, key: &str) -> bool {
        self.0.iter().any(|(known, _)| known == key)
    }

    /// Takes an option out.
    pub(crate) fn take(&mut self, key: &str) -> Option<Scalar> {
        let index = self.0.iter().position(|(known, _)| known == key)?;
        Some(self.0.remove(index).1)
    }

    /// Takes a text out; another kind of value counts as none.
    pub(crate) fn take_text(&mut self, key: &str) -> Option<String> {
        match self.take(key) {
            Some(Scalar::Text(text)) => Some(text),
            _ => None,
        }
    }

    /// Takes the options out that begin with `prefix.`, without it.
    pub(crate) fn take_group(&mut self, prefix: &str) -> Self {
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
    pub fn text(&self, key: &str) -> Option<String> {
        self.0.iter().find(|(known, _)| known == key).map(|(_, value)| value.to_string())
    }

    /// All options in order.
    pub fn iter(&self) -> impl Iterator<Item = (&str, &Scalar)> {
        self.0.iter().map(|(key, value)| (&**key, value))
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}
