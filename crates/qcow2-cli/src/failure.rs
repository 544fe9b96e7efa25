//! What ends a command early: the text for the user and the exit code.

use crate::exit;
use std::fmt;

/// A command that did not do what was asked. `Display` gives the message without the program's name.
#[derive(Clone, Debug)]
pub(crate) struct Failure {
    kind: Kind,
    message: String,
    /// The message without the image that it is about.
    reason: Option<Box<str>>,
    /// The message in our own words.
    own: Option<Box<Own>>,
    /// Lines that come first, the first of them with the program's name too.
    before: Option<Box<[String]>>,
    hints: Vec<Hint>,
    code: u8,
}

/// A message in other words than those of the tool that is stood in for.
#[derive(Clone, Debug)]
struct Own {
    sentence: String,
    /// What is left of it where the image is named already.
    short: Option<String>,
}

/// A line that follows the message.
#[derive(Clone, Debug)]
struct Hint {
    line: String,
    /// Whether the tool that is stood in for has no such line.
    own: bool,
}

/// How a failure is put to the user.
#[derive(Clone, Copy, Debug)]
enum Kind {
    /// `program: message`.
    Plain,
    /// `program: message` and a line that points at the help of the verb.
    Usage(Option<&'static str>),
    /// `program verb: message` and a line that points at the help: the form of option syntax errors.
    Syntax(Option<&'static str>),
    /// Nothing: all was said already.
    Silent,
    /// No failure, but what was asked for.
    Help,
}

impl Failure {
    /// A failure with exit code 1.
    pub(crate) fn new(message: impl Into<String>) -> Self {
        Self {
            kind: Kind::Plain,
            message: message.into(),
            reason: None,
            own: None,
            before: None,
            hints: Vec::new(),
            code: exit::FAILURE,
        }
    }

    /// Operands or option values that make no sense to `verb`.
    pub(crate) fn usage(verb: &'static str, message: impl Into<String>) -> Self {
        Self { kind: Kind::Usage(Some(verb)), ..Self::new(message) }
    }

    /// No verb, or one that is not known.
    pub(crate) fn general_usage(message: impl Into<String>) -> Self {
        Self { kind: Kind::Usage(None), ..Self::new(message) }
    }

    /// Options that cannot be understood; `verb` is `None` before one is known.
    pub(crate) fn syntax(verb: Option<&'static str>, message: impl Into<String>) -> Self {
        Self { kind: Kind::Syntax(verb), ..Self::new(message) }
    }

    /// An image that could not be opened.
    pub(crate) fn could_not_open(name: &str, reason: &str) -> Self {
        let message = format!("Could not open '{name}': {reason}");
        Self { reason: Some(reason.into()), ..Self::new(message) }
    }

    /// Gives the message in our own words too, and shorter where the image is named already.
    pub(crate) fn in_own_words(self, sentence: String, short: Option<String>) -> Self {
        Self { own: Some(Box::new(Own { sentence, short })), ..self }
    }

    /// With the message in our own words, if it has any.
    pub(crate) fn own_words(mut self) -> Self {
        self.message = self.own.take().map_or(self.message, |own| own.sentence);
        self
    }

    /// The same for who has named the image already.
    pub(crate) fn own_reason(mut self) -> Self {
        self.message = self.own.take().and_then(|own| own.short).unwrap_or(self.message);
        self
    }

    /// A failure that prints nothing more.
    pub(crate) fn silent(code: u8) -> Self {
        Self { kind: Kind::Silent, code, ..Self::new("") }
    }

    /// Help that was asked for in the middle of options: it ends the command, and is printed as what it is.
    pub(crate) fn help(text: String) -> Self {
        Self { kind: Kind::Help, code: exit::SUCCESS, ..Self::new(text) }
    }

    pub(crate) fn as_help(&self) -> Option<&str> {
        matches!(self.kind, Kind::Help).then_some(&*self.message)
    }

    /// The message and what follows it, as lines.
    pub(crate) fn texts(&self) -> Vec<String> {
        let hints = self.hints.iter().filter(|hint| !hint.own).map(|hint| hint.line.clone());
        std::iter::once(self.message.clone()).chain(hints).collect()
    }

    /// Puts the lines of another message before this one.
    pub(crate) fn after(self, message: Vec<String>) -> Self {
        Self { before: Some(message.into()), ..self }
    }

    /// Adds a line that follows the message, without the program's name.
    pub(crate) fn hint(mut self, line: impl Into<String>) -> Self {
        self.hints.push(Hint { line: line.into(), own: false });
        self
    }

    /// Adds a line that helps, and that the tool which is stood in for does not have.
    pub(crate) fn advise(mut self, line: impl Into<String>) -> Self {
        self.hints.push(Hint { line: line.into(), own: true });
        self
    }

    /// Lines that are for people who did not ask for another tool's words.
    pub(crate) fn advice(&self) -> impl Iterator<Item = &str> {
        self.hints.iter().filter(|hint| hint.own).map(|hint| &*hint.line)
    }

    /// Puts `name: ` before the message, as creating an image does.
    pub(crate) fn about(mut self, name: &str) -> Self {
        self.message = format!("{name}: {}", self.message);
        self.own.iter_mut().for_each(|own| own.sentence = format!("{name}: {}", own.sentence));
        self
    }

    /// Whether it is about an image that could not be opened.
    pub(crate) fn is_of_opening(&self) -> bool {
        self.reason.is_some()
    }

    /// Leaves out the image that the message is about.
    pub(crate) fn without_name(mut self) -> Self {
        self.message = self.reason.take().map_or(self.message, String::from);
        self
    }

    /// Puts `words` before the message.
    pub(crate) fn after_words(mut self, words: &str) -> Self {
        self.message = format!("{words}{}", self.message);
        self
    }

    /// The same with another message.
    pub(crate) fn with_message(self, message: impl Into<String>) -> Self {
        Self { message: message.into(), ..self }
    }

    /// Gives another exit code than 1.
    pub(crate) fn with_code(mut self, code: u8) -> Self {
        if self.code == exit::FAILURE {
            self.code = code;
        }
        self
    }

    /// The exit code.
    pub(crate) fn code(&self) -> u8 {
        self.code
    }

    /// Every line for standard error. `program`: the name before messages; `called`: how it was called, which
    /// is the name in option syntax errors and pointers to help.
    pub(crate) fn lines(&self, program: &str, called: &str) -> Vec<String> {
        let (name, verb) = match self.kind {
            Kind::Silent | Kind::Help => return Vec::new(),
            Kind::Plain => (program.to_owned(), None),
            Kind::Usage(verb) => (program.to_owned(), Some(verb)),
            Kind::Syntax(None) => (called.to_owned(), Some(None)),
            Kind::Syntax(Some(verb)) => (format!("{called} {verb}"), Some(Some(verb))),
        };
        let mut lines = self.before.clone().map_or_else(Vec::new, Vec::from);
        lines.first_mut().into_iter().for_each(|text| text.insert_str(0, &format!("{program}: ")));
        lines.push(format!("{name}: {}", self.message));
        lines.extend(self.hints.iter().filter(|hint| !hint.own).map(|hint| hint.line.clone()));
        match verb {
            Some(Some(verb)) => lines.push(format!("Try '{called} {verb} --help' for more info")),
            Some(None) => lines.push(format!("Try '{called} --help' for more info")),
            None => {}
        }
        lines
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl std::error::Error for Failure {}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check(failure: Failure, lines: &[&str]) {
        assert_eq!(failure.lines("qemu-img", "bin/qemu-img"), lines);
    }

    #[test]
    fn how_failures_are_put() {
        let info = "info";
        check(Failure::new("no").hint("perhaps"), &["qemu-img: no", "perhaps"]);
        let two = vec!["first".to_owned(), "second".to_owned()];
        check(Failure::new("no").about("x"), &["qemu-img: x: no"]);
        check(Failure::new("no").after(two), &["qemu-img: first", "second", "qemu-img: no"]);
        check(Failure::could_not_open("x", "why"), &["qemu-img: Could not open 'x': why"]);
        check(Failure::could_not_open("x", "why").without_name(), &["qemu-img: why"]);
        let advised = Failure::new("no").advise("look there");
        assert_eq!(advised.advice().collect::<Vec<_>>(), ["look there"]);
        check(advised, &["qemu-img: no"]);
        check(Failure::silent(0), &[]);
        let help = "Try 'bin/qemu-img info --help' for more info";
        check(Failure::usage(info, "no"), &["qemu-img: no", help]);
        check(Failure::syntax(Some(info), "no"), &["bin/qemu-img info: no", help]);
        let help = "Try 'bin/qemu-img --help' for more info";
        check(Failure::syntax(None, "no"), &["bin/qemu-img: no", help]);
        check(Failure::general_usage("no"), &["qemu-img: no", help]);
    }
}
