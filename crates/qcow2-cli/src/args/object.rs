//! `--object`: secrets, by identifier.

use crate::failure::Failure;
use qcow2_blockdev::Secrets;
use qcow2_terminal::Terminal;
use std::sync::Arc;

/// The objects defined on the command line; for what they do not have, a person at the terminal is asked.
#[derive(Clone, Debug)]
pub(crate) struct Objects(Secrets);

impl Default for Objects {
    fn default() -> Self {
        Self(Secrets::asking(Arc::new(Terminal)))
    }
}

impl Objects {
    /// Adds the object that `text` defines.
    pub(crate) fn add(&mut self, text: &str) -> Result<(), Failure> {
        Ok(self.0.define(text)?)
    }

    /// All of them.
    pub(crate) fn secrets(&self) -> &Secrets {
        &self.0
    }
}

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
    fn refused_secrets_in_qemus_words() {
        check(&["secret,id=a-b.c_9,data=x"], "");
        check(&["secret,data=x"], "Parameter 'id' is missing");
        check(&["secret,id=-a,data=x"], "Parameter 'id' expects an identifier");
        check(&["foo,id=a"], "Parameter 'qom-type' does not accept value 'foo'");
        check(&["secret,id=a"], "Either 'file' or 'data' must be provided");
        check(&["secret,id=a,data=x,foo=y"], "Parameter 'foo' is unexpected");
        check(&["secret,id=a,data=x,format=hex"], "Parameter 'format' does not accept value 'hex'");
        check(&["secret,id=a,data=x,format=base64"], "The secret is not valid base64 data");
        check(&["secret,id=a,data=x,keyid=k"], "No secret with id 'k'");
        check(&[",id=a"], "Invalid parameter ''");
        check(
            &["secret,id=a,data=x", "secret,id=a,data=y"],
            "attempt to add duplicate property 'a' to object (type 'container')",
        );
    }
}
