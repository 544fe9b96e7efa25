//! `--object`: secrets, by identifier.

use crate::failure::Failure;
use crate::optlist::OptList;
use std::collections::BTreeSet;

/// The objects defined on the command line. Until encrypted images can be read, a secret is checked and forgotten.
#[derive(Debug, Default)]
pub(crate) struct Objects {
    ids: BTreeSet<String>,
}

impl Objects {
    /// Adds the object that `text` (`secret,id=NAME,data=TEXT` or `...,file=PATH`) defines.
    pub(crate) fn add(&mut self, text: &str) -> Result<(), Failure> {
        let list = OptList::parse_object(text).map_err(Failure::new)?;
        let kind = list.last("qom-type").ok_or_else(|| Failure::new("Parameter 'qom-type' is missing"))?;
        if kind != "secret" {
            return Err(Failure::new(format!("Parameter 'qom-type' does not accept value '{kind}'")));
        }
        let id = list.last("id").ok_or_else(|| Failure::new("Parameter 'id' is missing"))?;
        if !is_identifier(id) {
            return Err(Failure::new("Parameter 'id' expects an identifier").hint(IDENTIFIER_HINT));
        }
        if let Some(pair) = list.pairs().iter().find(|pair| !KNOWN.contains(&&*pair.key)) {
            return Err(Failure::new(format!("Parameter '{}' is unexpected", pair.key)));
        }
        match (list.last("data"), list.last("file")) {
            (Some(_), Some(_)) => return Err(Failure::new("'file' and 'data' are mutually exclusive")),
            (None, None) => return Err(Failure::new("Either 'file' or 'data' must be provided")),
            _ => {}
        }
        if !self.ids.insert(id.to_owned()) {
            return Err(Failure::new(format!(
                "attempt to add duplicate property '{id}' to object (type 'container')"
            )));
        }
        Ok(())
    }
}

fn is_identifier(text: &str) -> bool {
    text.starts_with(|c: char| c.is_ascii_alphabetic())
        && text.chars().all(|c| c.is_ascii_alphanumeric() || matches!(c, '-' | '.' | '_'))
}

const KNOWN: [&str; 5] = ["qom-type", "id", "data", "file", "format"];
const IDENTIFIER_HINT: &str =
    "Identifiers consist of letters, digits, '-', '.', '_', starting with a letter.";

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check(texts: &[&str], expected: &str) {
        let mut objects = Objects::default();
        let failure = texts.iter().find_map(|text| objects.add(text).err());
        assert_eq!(failure.map(|f| f.to_string()).unwrap_or_default(), expected);
    }

    #[test]
    fn secrets() {
        check(&["secret,id=a-b.c_9,data=x"], "");
        check(&["qom-type=secret,id=a,file=/dev/null"], "");
        check(&["secret,id=a,data=x", "secret,id=b,data=x"], "");
        check(&["secret,data=x"], "Parameter 'id' is missing");
        check(&["secret,id=-a,data=x"], "Parameter 'id' expects an identifier");
        check(&["foo,id=a"], "Parameter 'qom-type' does not accept value 'foo'");
        check(&["secret,id=a"], "Either 'file' or 'data' must be provided");
        check(&["secret,id=a,data=x,foo=y"], "Parameter 'foo' is unexpected");
        check(
            &["secret,id=a,data=x", "secret,id=a,data=y"],
            "attempt to add duplicate property 'a' to object (type 'container')",
        );
    }
}
