//! Options in the manner of GNU `getopt_long`: short clusters, long names that may be abbreviated, options
//! after operands. Its error texts are part of what scripts see, so they are kept to the letter. Knows no
//! program: what an option means is the caller's type `O`.
//!
//! ```
//! use qcow2_getopt::{Getopt, OptionSpec};
//!
//! let (exact, own) = (false, false);
//! let (short, long, value) = (Some('f'), Some("format"), Some("FMT"));
//! let specs = [OptionSpec { opt: 'f', short, long, exact, own, value, help: "" }];
//! let args = ["--form=raw", "disk"].map(str::to_owned).to_vec();
//! let mut getopt = Getopt::new(&specs, args, true);
//! let given = getopt.next()?.expect("an option");
//! assert_eq!((given.opt, &*given.value), ('f', "raw"));
//! assert!(getopt.next()?.is_none());
//! assert_eq!(getopt.into_operands(), ["disk"]);
//! # Ok::<(), String>(())
//! ```
//!
//! Crates that were tried instead. `clap` 4.6 takes `-f=raw` as `raw`, refuses a value that begins with `-`
//! and an option given twice unless each option says otherwise, does not say which names an abbreviation
//! could mean, and its errors lack what getopt prints (`--limits` for `--limits=3`): nothing of this file
//! would go. `lexopt` 0.3 splits arguments just so, with `set_short_equals(false)`, `try_raw_args` for signed
//! numbers and for the first operand that ends the options, and `optional_value` for the text of errors. It
//! knows no options, though: abbreviations, their ambiguity and every text stay here. With it this file had
//! 124 lines of code, without it 132, and a dependency is not worth eight lines.

#![forbid(unsafe_code)]

mod nearest;

pub use nearest::nearest;

/// One spelling of an option.
#[derive(Debug)]
pub struct OptionSpec<O> {
    /// What it means; several specs may mean the same.
    pub opt: O,
    /// `f` of `-f`.
    pub short: Option<char>,
    /// `format` of `--format`.
    pub long: Option<&'static str>,
    /// True if `long` must be spelled out and stays out of lists of possibilities: for spellings that the
    /// help of the original names though it does not know them.
    pub exact: bool,
    /// True if the program that is stood in for has no such option.
    pub own: bool,
    /// The name of its value in the help, if it takes one.
    pub value: Option<&'static str>,
    /// What the help says; empty for a second spelling.
    pub help: &'static str,
}

/// An option as given.
#[derive(Debug, PartialEq, Eq)]
pub struct Given<O> {
    /// What it means.
    pub opt: O,
    /// Its value; empty for options that take none.
    pub value: String,
}

/// Walks over arguments, giving options one by one and keeping operands for the end.
#[derive(Debug)]
pub struct Getopt<'a, O> {
    specs: &'a [OptionSpec<O>],
    /// Those of every verb.
    common: &'a [OptionSpec<O>],
    args: std::vec::IntoIter<String>,
    /// What is left of a cluster of short options.
    cluster: String,
    operands: Vec<String>,
    permute: bool,
    number_follows: bool,
    without_own: bool,
    /// The long name that nothing begins with.
    unknown: Option<String>,
}

impl<'a, O: Copy> Getopt<'a, O> {
    /// `permute`: true if options may follow operands; otherwise the first operand ends the options.
    #[must_use]
    pub fn new(specs: &'a [OptionSpec<O>], args: Vec<String>, permute: bool) -> Self {
        Self {
            specs,
            common: &[],
            args: args.into_iter(),
            cluster: String::new(),
            operands: Vec::new(),
            permute,
            number_follows: false,
            without_own: false,
            unknown: None,
        }
    }

    /// Knows only the options that the tool has that is stood in for.
    #[must_use]
    pub fn without_own(mut self) -> Self {
        self.without_own = true;
        self
    }

    /// Knows these options too.
    #[must_use]
    pub fn with_common(self, common: &'a [OptionSpec<O>]) -> Self {
        Self { common, ..self }
    }

    fn specs(&self) -> impl Iterator<Item = &'a OptionSpec<O>> + use<'a, O> {
        let without_own = self.without_own;
        self.specs.iter().chain(self.common).filter(move |spec| !(spec.own && without_own))
    }

    /// Takes `-` and digits right after the first operand for an operand too. A third operand before `--`
    /// ends the options: it is one too many, whatever follows it.
    #[must_use]
    pub fn with_signed_number(mut self) -> Self {
        self.number_follows = true;
        self
    }

    /// The next option, or `None` when only operands are left. Errors: the text that getopt would print.
    #[allow(clippy::should_implement_trait, reason = "an iterator would end at the first error")]
    pub fn next(&mut self) -> Result<Option<Given<O>>, String> {
        if let Some(letter) = self.cluster.chars().next() {
            self.cluster.remove(0);
            return self.short(letter).map(Some);
        }
        while let Some(arg) = self.args.next() {
            if arg == "--" {
                self.operands.extend(self.args.by_ref());
            } else if let Some(long) = arg.strip_prefix("--") {
                return self.long(long).map(Some);
            } else if let Some(letter) = arg.strip_prefix('-').and_then(|rest| rest.chars().next()) {
                self.cluster = arg[1 + letter.len_utf8()..].to_owned();
                return self.short(letter).map(Some);
            } else {
                self.operands.push(arg);
                let signed = |next: &&String| {
                    next.strip_prefix('-').is_some_and(|n| n.starts_with(|c: char| c.is_ascii_digit()))
                };
                if self.number_follows
                    && self.operands.len() == 1
                    && self.args.as_slice().first().as_ref().is_some_and(signed)
                {
                    self.operands.extend(self.args.next());
                }
                if !self.permute || (self.number_follows && self.operands.len() > 2) {
                    self.operands.extend(self.args.by_ref());
                }
            }
        }
        Ok(None)
    }

    /// What is not an option, in order; complete once [`next`](Self::next) has given `None`.
    pub fn into_operands(self) -> Vec<String> {
        self.operands
    }

    /// The long option, with its dashes, that was meant by one that is not known.
    pub fn meant(&self) -> Option<String> {
        let names = self.specs().filter(|spec| !spec.exact).filter_map(|spec| spec.long);
        nearest(self.unknown.as_deref()?, names).map(|name| format!("--{name}"))
    }

    fn short(&mut self, letter: char) -> Result<Given<O>, String> {
        let spec = self.specs().find(|s| s.short == Some(letter));
        let spec = spec.ok_or_else(|| format!("invalid option -- '{letter}'"))?;
        if spec.value.is_none() {
            return Ok(Given { opt: spec.opt, value: String::new() });
        }
        let value = match std::mem::take(&mut self.cluster) {
            rest if !rest.is_empty() => rest,
            _ => self.args.next().ok_or_else(|| format!("option requires an argument -- '{letter}'"))?,
        };
        Ok(Given { opt: spec.opt, value })
    }

    fn long(&mut self, text: &str) -> Result<Given<O>, String> {
        let (name, value) = match text.split_once('=') {
            Some((name, value)) => (name, Some(value.to_owned())),
            None => (text, None),
        };
        let spec = self.find_long(name).map_err(|possible| {
            self.unknown = possible.is_empty().then(|| name.to_owned());
            ambiguous_or_unknown(text, &possible)
        })?;
        let long = spec.long.unwrap_or(name);
        let value = match (spec.value, value) {
            (None, Some(_)) => return Err(format!("option '--{long}' doesn't allow an argument")),
            (None, None) => String::new(),
            (Some(_), Some(value)) => value,
            (Some(_), None) => {
                self.args.next().ok_or_else(|| format!("option '--{long}' requires an argument"))?
            }
        };
        Ok(Given { opt: spec.opt, value })
    }

    /// The option whose long name is `name`, or the only one that starts so; else the names that do.
    fn find_long(&self, name: &str) -> Result<&'a OptionSpec<O>, Vec<&'static str>> {
        let named = |s: &&OptionSpec<O>| s.long == Some(name);
        if let Some(spec) = self.specs().find(named) {
            return Ok(spec);
        }
        let starts = |s: &&OptionSpec<O>| !s.exact && s.long.is_some_and(|l| l.starts_with(name));
        let possible: Vec<&OptionSpec<O>> = self.specs().filter(starts).collect();
        match possible[..] {
            [only] => Ok(only),
            _ => Err(possible.iter().filter_map(|s| s.long).collect()),
        }
    }
}

fn ambiguous_or_unknown(text: &str, possible: &[&str]) -> String {
    if possible.is_empty() {
        return format!("unrecognized option '--{text}'");
    }
    let names: Vec<String> = possible.iter().map(|name| format!("'--{name}'")).collect();
    format!("option '--{text}' is ambiguous; possibilities: {}", names.join(" "))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Options of a program.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    enum Opt {
        Help,
        Format,
        ForceShare,
        Output,
        Object,
    }

    const fn spec(
        opt: Opt,
        short: Option<char>,
        long: &'static str,
        value: Option<&'static str>,
    ) -> OptionSpec<Opt> {
        OptionSpec { opt, short, long: Some(long), exact: false, own: false, value, help: "" }
    }

    static SPECS: [OptionSpec<Opt>; 5] = [
        spec(Opt::Help, Some('h'), "help", None),
        spec(Opt::Format, Some('f'), "format", Some("FMT")),
        spec(Opt::ForceShare, Some('U'), "force-share", None),
        spec(Opt::Output, None, "output", Some("FORM")),
        OptionSpec { exact: true, ..spec(Opt::Object, None, "ob", Some("X")) },
    ];

    /// Options as `format=value`, joined with the operands, or the error.
    fn run(args: &[&str], permute: bool) -> Result<String, String> {
        let mut getopt = Getopt::new(&SPECS, args.iter().map(|a| (*a).to_owned()).collect(), permute);
        let mut seen = Vec::new();
        while let Some(given) = getopt.next()? {
            seen.push(format!("{:?}={}", given.opt, given.value));
        }
        seen.extend(getopt.into_operands());
        Ok(seen.join(" "))
    }

    #[track_caller]
    fn check(args: &[&str], expected: &str) {
        assert_eq!(run(args, true).unwrap(), expected);
    }

    #[track_caller]
    fn check_error(args: &[&str], expected: &str) {
        assert_eq!(run(args, true).unwrap_err(), expected);
    }

    #[test]
    fn short_and_long_forms() {
        check(&["-f", "raw", "x"], "Format=raw x");
        check(&["-fraw", "x"], "Format=raw x");
        check(&["-Uf", "raw", "x"], "ForceShare= Format=raw x");
        check(&["-UfU", "x"], "ForceShare= Format=U x");
        check(&["--format=raw", "--format", "qcow2"], "Format=raw Format=qcow2");
        check(&["--format=", "--out=json"], "Format= Output=json");
        check(&["--forc", "--form", "x"], "ForceShare= Format=x");
        check(&["--ob", "v"], "Object=v");
    }

    #[test]
    fn operands_anywhere_until_two_dashes() {
        check(&["a", "-U", "b", "--", "-f", "--", "c"], "ForceShare= a b -f -- c");
        check(&["-", "x"], "- x");
        assert_eq!(run(&["-U", "a", "-U"], false).unwrap(), "ForceShare= a -U");
    }

    #[test]
    fn a_signed_number_after_the_first_operand() {
        let run = |args: &[&str]| {
            let args = args.iter().map(|a| (*a).to_owned()).collect();
            let mut getopt = Getopt::new(&SPECS, args, true).with_signed_number();
            while getopt.next()?.is_some() {}
            Ok::<_, String>(getopt.into_operands().join(" "))
        };
        assert_eq!(run(&["a", "-1M", "-U"]).unwrap(), "a -1M");
        assert_eq!(run(&["-1M", "a"]).unwrap_err(), "invalid option -- '1'");
        assert_eq!(run(&["a", "b", "-1M"]).unwrap_err(), "invalid option -- '1'");
        assert_eq!(run(&["a", "b", "c", "-1M"]).unwrap(), "a b c -1M");
        assert_eq!(run(&["a", "-1M", "c", "--format"]).unwrap(), "a -1M c --format");
        assert_eq!(run(&["a", "-U", "-1M"]).unwrap_err(), "invalid option -- '1'");
    }

    #[test]
    fn errors_to_the_letter() {
        check_error(&["-z"], "invalid option -- 'z'");
        check_error(&["-Uz"], "invalid option -- 'z'");
        check_error(&["-f"], "option requires an argument -- 'f'");
        check_error(&["--format"], "option '--format' requires an argument");
        check_error(&["--limits=3"], "unrecognized option '--limits=3'");
        check_error(&["--force-share=3"], "option '--force-share' doesn't allow an argument");
        check_error(&["--for=q"], "option '--for=q' is ambiguous; possibilities: '--format' '--force-share'");
        check_error(&["--o"], "option '--output' requires an argument");
    }

    #[test]
    fn an_unknown_long_name_may_be_a_slip() {
        let meant = |arg: &str| {
            let mut getopt = Getopt::new(&SPECS, vec![arg.to_owned()], true);
            assert!(getopt.next().is_err(), "{arg}");
            getopt.meant()
        };
        assert_eq!(meant("--fromat=raw").as_deref(), Some("--format"));
        assert_eq!(meant("--helo").as_deref(), Some("--help"));
        // Neither an option that is not shown, nor what is known, nor a letter.
        assert_eq!(meant("--obj"), None);
        assert_eq!(meant("--force-share=3"), None);
        assert_eq!(meant("--for"), None);
        assert_eq!(meant("-z"), None);
    }
}
