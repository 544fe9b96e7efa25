//! Commands as JSON.

use super::backup::Backup;
use qcow2_ops::bitmap::BitmapAction;
use serde_json::{Map, Value};
use std::fmt;

/// What to do with a disk.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub enum Action {
    /// Tell the files of each disk.
    Query,
    /// Tell what clients have done.
    Statistics,
    /// The same as text for Prometheus.
    Metrics,
    /// A new overlay becomes the top.
    Snapshot {
        /// The overlay's file.
        file: String,
    },
    /// A layer is merged into the one below it.
    Commit {
        /// How many layers are above it.
        depth: usize,
    },
    /// A copy of the disk as it is at one moment, or of what has changed.
    Backup(Backup),
    /// A snapshot inside the top file.
    SnapshotSave {
        /// Its name.
        name: String,
    },
    /// Delete one.
    SnapshotDelete {
        /// Its id or name.
        name: String,
    },
    /// Tell them.
    SnapshotList,
    /// Change a bitmap of the top file.
    Bitmap {
        /// Its name.
        bitmap: String,
        /// What is done.
        action: BitmapAction,
    },
    /// Tell the bitmaps.
    BitmapList,
    /// Change the size of the disk.
    Resize {
        /// Bytes.
        size: u64,
    },
}

/// A line of a client.
#[derive(Clone, Debug, PartialEq)]
pub struct Command {
    /// Comes back in the answer.
    pub id: Option<Value>,
    /// The export that is meant; `None`: the only one.
    pub disk: Option<String>,
    /// What to do.
    pub action: Action,
}

/// A line that is no command; the text says why.
#[derive(Clone, Debug, PartialEq)]
pub struct CommandError {
    /// The `id` of the line, if it has one.
    pub id: Option<Value>,
    text: String,
}

impl fmt::Display for CommandError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

impl std::error::Error for CommandError {}

impl Command {
    /// Understands a line. A member that the command does not have is an error: it may be misspelt.
    pub fn parse(line: &str) -> Result<Self, CommandError> {
        let refuse = |id, text| CommandError { id, text };
        let members = match serde_json::from_str(line) {
            Ok(Value::Object(members)) => members,
            Ok(_) => return Err(refuse(None, "a JSON object is expected".to_owned())),
            Err(error) => return Err(refuse(None, format!("a JSON object is expected: {error}"))),
        };
        let mut members = Members(members);
        let id = members.0.shift_remove("id");
        let parsed = members.command();
        parsed.map(|(disk, action)| Self { id: id.clone(), disk, action }).map_err(|text| refuse(id, text))
    }
}

struct Members(Map<String, Value>);

impl Members {
    fn command(mut self) -> Result<(Option<String>, Action), String> {
        let name = self.text("command")?;
        let disk = self.optional_text("disk")?;
        let action = self.action(&name)?;
        match self.0.keys().next() {
            None => Ok((disk, action)),
            Some(other) => Err(format!("the command '{name}' has no member '{other}'")),
        }
    }

    fn action(&mut self, name: &str) -> Result<Action, String> {
        Ok(match name {
            "query" => Action::Query,
            "statistics" => Action::Statistics,
            "metrics" => Action::Metrics,
            "snapshot" => Action::Snapshot { file: self.text("file")? },
            "commit" => {
                let depth = self.number("depth")?.unwrap_or(0);
                Action::Commit { depth: usize::try_from(depth).map_err(|_| "the chain is not that deep")? }
            }
            "backup" => {
                let (file, format) = (self.text("file")?, self.optional_text("format")?);
                let (bitmap, clear) = (self.optional_text("bitmap")?, self.switch("clear")?);
                if clear && bitmap.is_none() {
                    return Err("the member 'clear' is about a bitmap, and there is none".to_owned());
                }
                Action::Backup(Backup { file, format, bitmap, clear })
            }
            "snapshot-save" => Action::SnapshotSave { name: self.text("name")? },
            "snapshot-delete" => Action::SnapshotDelete { name: self.text("name")? },
            "snapshot-list" => Action::SnapshotList,
            "bitmap-list" => Action::BitmapList,
            "resize" => Action::Resize { size: self.number("size")?.ok_or("the member 'size' is missing")? },
            _ => {
                let action = match name.strip_prefix("bitmap-") {
                    Some("add") => BitmapAction::Add { granularity: self.number("granularity")? },
                    Some("remove") => BitmapAction::Remove,
                    Some("clear") => BitmapAction::Clear,
                    Some("enable") => BitmapAction::Enable,
                    Some("disable") => BitmapAction::Disable,
                    Some("merge") => BitmapAction::Merge { source: self.text("source")? },
                    _ => return Err(format!("there is no command '{name}'")),
                };
                Action::Bitmap { bitmap: self.text("bitmap")?, action }
            }
        })
    }

    fn text(&mut self, name: &str) -> Result<String, String> {
        self.optional_text(name)?.ok_or_else(|| format!("the member '{name}' is missing"))
    }

    fn optional_text(&mut self, name: &str) -> Result<Option<String>, String> {
        match self.0.shift_remove(name) {
            None => Ok(None),
            Some(Value::String(text)) => Ok(Some(text)),
            Some(_) => Err(format!("the member '{name}' must be a string")),
        }
    }

    /// True or false, or a word for it, which is what a command line has; false if missing.
    fn switch(&mut self, name: &str) -> Result<bool, String> {
        match self.0.shift_remove(name) {
            None => Ok(false),
            Some(Value::Bool(value)) => Ok(value),
            Some(Value::String(text)) if text == "on" => Ok(true),
            Some(Value::String(text)) if text == "off" => Ok(false),
            Some(_) => Err(format!("the member '{name}' must be true or false, or 'on' or 'off'")),
        }
    }

    fn number(&mut self, name: &str) -> Result<Option<u64>, String> {
        let Some(value) = self.0.shift_remove(name) else { return Ok(None) };
        match value.as_u64() {
            Some(number) => Ok(Some(number)),
            None => Err(format!("the member '{name}' must be a number that is whole and not negative")),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn commands_have_their_members_and_no_others() {
        let parse = |line: &str| Command::parse(line).map_err(|error| error.to_string());
        let action = |line: &str| parse(line).unwrap().action;
        assert_eq!(action(r#"{"command":"snapshot","file":"a"}"#), Action::Snapshot { file: "a".to_owned() });
        assert_eq!(action(r#"{"command":"commit"}"#), Action::Commit { depth: 0 });
        assert_eq!(action(r#"{"command":"commit","depth":2}"#), Action::Commit { depth: 2 });
        assert_eq!(action(r#"{"command":"resize","size":512}"#), Action::Resize { size: 512 });
        let backup = |line: &str| match action(line) {
            Action::Backup(Backup { file, format, bitmap, clear }) => (file, format, bitmap, clear),
            other => panic!("{other:?}"),
        };
        let (file, b) = ("a".to_owned(), Some("b".to_owned()));
        assert_eq!(backup(r#"{"command":"backup","file":"a"}"#), (file.clone(), None, None, false));
        let line = r#"{"command":"backup","file":"a","format":"b","bitmap":"b","clear":"on"}"#;
        assert_eq!(backup(line), (file.clone(), b.clone(), b.clone(), true));
        let line = r#"{"command":"backup","file":"a","bitmap":"b","clear":true}"#;
        assert_eq!(backup(line), (file, None, b, true));
        let merge = action(r#"{"command":"bitmap-merge","bitmap":"a","source":"b"}"#);
        let source = "b".to_owned();
        assert_eq!(merge, Action::Bitmap { bitmap: "a".to_owned(), action: BitmapAction::Merge { source } });
        let whole = parse(r#"{"id":[1],"disk":"d","command":"query"}"#).unwrap();
        assert_eq!((whole.id, whole.disk), (Some(serde_json::json!([1])), Some("d".to_owned())));
        for (line, text) in [
            ("", "a JSON object is expected: EOF while parsing a value at line 1 column 0"),
            ("[]", "a JSON object is expected"),
            ("{}", "the member 'command' is missing"),
            (r#"{"command":1}"#, "the member 'command' must be a string"),
            (r#"{"command":"no"}"#, "there is no command 'no'"),
            (r#"{"command":"bitmap-no"}"#, "there is no command 'bitmap-no'"),
            (r#"{"command":"snapshot"}"#, "the member 'file' is missing"),
            (r#"{"command":"query","file":"a"}"#, "the command 'query' has no member 'file'"),
            (r#"{"command":"backup"}"#, "the member 'file' is missing"),
            (
                r#"{"command":"backup","file":"a","bitmap":"b","clear":1}"#,
                "the member 'clear' must be true or false, or 'on' or 'off'",
            ),
            (
                r#"{"command":"backup","file":"a","clear":true}"#,
                "the member 'clear' is about a bitmap, and there is none",
            ),
            (r#"{"command":"resize"}"#, "the member 'size' is missing"),
            (
                r#"{"command":"resize","size":-1}"#,
                "the member 'size' must be a number that is whole and not negative",
            ),
        ] {
            assert_eq!(parse(line).unwrap_err(), text, "{line}");
        }
        assert_eq!(Command::parse(r#"{"id":7}"#).unwrap_err().id, Some(serde_json::json!(7)));
    }
}
