//! Option strings: `key=value,key=value`, where `,,` in a value stands for one comma.

use crate::failure::Failure;

/// One `key=value`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Pair {
    /// Before the first `=`.
    pub(crate) key: String,
    /// After it.
    pub(crate) value: String,
}

/// An option string, taken apart. The same key may come again; the last one counts.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct OptList {
    pairs: Vec<Pair>,
    asks_help: bool,
}

impl OptList {
    /// Lets through a value of `-o` that has no empty end, and so can be joined with others.
    pub(crate) fn checked(text: String) -> Result<String, Failure> {
        if text.is_empty() || text.starts_with(',') || ends_in_lone_comma(&text) {
            return Err(Failure::new(format!("Invalid option list: {text}")));
        }
        Ok(text)
    }

    /// Reads the values of `-o` options, in the order given. A lone `key` means `key=on` and a lone `nokey`
    /// means `key=off`; a lone `help` or `?` asks for help.
    pub(crate) fn parse_image_options(texts: &[String]) -> Self {
        let mut list = Self::default();
        for text in texts {
            for item in split(text) {
                match item.split_once('=') {
                    Some((key, value)) => list.push(key, value),
                    None if item == "help" || item == "?" => list.asks_help = true,
                    None => match item.strip_prefix("no") {
                        Some(key) => list.push(key, "off"),
                        None => list.push(&item, "on"),
                    },
                }
            }
        }
        list
    }

    /// Reads the value of `--object`: the first item may be the type alone, every other must be `key=value`.
    /// Errors: the message.
    pub(crate) fn parse_object(text: &str) -> Result<Self, String> {
        Self::parse_pairs(text, Some("qom-type"))
    }

    /// Reads `key=value` pairs only; `implied`: the key of a first item without one. Errors: the message.
    pub(crate) fn parse_pairs(text: &str, implied: Option<&str>) -> Result<Self, String> {
        let mut list = Self::default();
        for (index, item) in split(text).iter().enumerate() {
            match (item.split_once('='), implied) {
                (Some(("", _)), _) => return Err("Invalid parameter ''".to_owned()),
                (Some((key, value)), _) => list.push(key, value),
                (None, Some(implied)) if index == 0 && !item.is_empty() => list.push(implied, item),
                (None, _) if item.is_empty() && index > 0 => {}
                (None, _) if item.is_empty() => return Err("Invalid parameter ''".to_owned()),
                (None, _) => return Err(format!("Expected '=' after parameter '{item}'")),
            }
        }
        Ok(list)
    }

    /// Reads the option string of an image, in which a lone `key` is `key=on` and a lone `nokey` is
    /// `key=off`. With the list come the warnings that this is deprecated. Errors: the message.
    pub(crate) fn parse_name(text: &str) -> Result<(Self, Vec<String>), String> {
        let (mut list, mut warnings) = (Self::default(), Vec::new());
        for (index, item) in split(text).iter().enumerate() {
            match item.split_once('=') {
                Some(("", _)) => return Err("Invalid parameter ''".to_owned()),
                Some((key, value)) => list.push(key, value),
                None if item.is_empty() && index > 0 => {}
                None if item.is_empty() => return Err("Invalid parameter ''".to_owned()),
                None => {
                    let (key, value) = item.strip_prefix("no").map_or((&**item, "on"), |key| (key, "off"));
                    warnings.push(format!(
                        "short-form boolean option '{item}' deprecated\nPlease use {key}={value} instead"
                    ));
                    list.push(key, value);
                }
            }
        }
        Ok((list, warnings))
    }

    /// Whether help was asked for.
    pub(crate) fn asks_help(&self) -> bool {
        self.asks_help
    }

    /// All pairs in order.
    pub(crate) fn pairs(&self) -> &[Pair] {
        &self.pairs
    }

    /// The value that counts for `key`.
    pub(crate) fn last(&self, key: &str) -> Option<&str> {
        self.pairs.iter().rev().find(|pair| pair.key == key).map(|pair| pair.value.as_str())
    }

    /// Takes every pair of `key` out; the value that counted for it.
    pub(crate) fn take(&mut self, key: &str) -> Option<String> {
        let taken = self.last(key).map(str::to_owned);
        self.pairs.retain(|pair| pair.key != key);
        taken
    }

    fn push(&mut self, key: &str, value: &str) {
        self.pairs.push(Pair { key: key.to_owned(), value: value.to_owned() });
    }
}

/// `value` as it stands in an option string.
pub(crate) fn escape_commas(value: &str) -> String {
    value.replace(',', ",,")
}

/// The first item of an option string.
pub(crate) fn first_item(text: &str) -> String {
    split(text).swap_remove(0)
}

/// Cuts at single commas; of a pair of commas one stays.
fn split(text: &str) -> Vec<String> {
    let mut items = vec![String::new()];
    let mut chars = text.chars().peekable();
    while let Some(c) = chars.next() {
        if c == ',' && chars.next_if_eq(&',').is_none() {
            items.push(String::new());
        } else if let Some(item) = items.last_mut() {
            item.push(c);
        }
    }
    items
}

fn ends_in_lone_comma(text: &str) -> bool {
    text.bytes().rev().take_while(|&b| b == b',').count() % 2 == 1
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check(texts: &[&str], expected: &[(&str, &str)], help: bool) {
        let texts: Vec<String> = texts.iter().map(|t| (*t).to_owned()).collect();
        let list = OptList::parse_image_options(&texts);
        let pairs: Vec<(&str, &str)> = list.pairs().iter().map(|p| (&*p.key, &*p.value)).collect();
        assert_eq!((&pairs[..], list.asks_help()), (expected, help), "{texts:?}");
    }

    #[test]
    fn image_options() {
        check(&["a=1,b=2"], &[("a", "1"), ("b", "2")], false);
        check(&["a=1", "a=2"], &[("a", "1"), ("a", "2")], false);
        check(&["a=x,,y,b=,,"], &[("a", "x,y"), ("b", ",")], false);
        check(&["a=x,,,b=1"], &[("a", "x,"), ("b", "1")], false);
        check(&["lazy,nosize,no"], &[("lazy", "on"), ("size", "off"), ("", "off")], false);
        check(&["a=b=c,=3,="], &[("a", "b=c"), ("", "3"), ("", "")], false);
        check(&["a=1,help"], &[("a", "1")], true);
        check(&["?"], &[], true);
        check(&["help=1,??"], &[("help", "1"), ("??", "on")], false);
    }

    #[test]
    fn image_options_that_cannot_be_joined() {
        for text in ["", ",a=1", "a=1,", "a=1,,,", "help,", ",help"] {
            let failure = OptList::checked(text.to_owned()).unwrap_err();
            assert_eq!(failure.to_string(), format!("Invalid option list: {text}"));
        }
        assert!(OptList::checked("a=1,,".to_owned()).is_ok());
    }

    #[test]
    fn objects() {
        let list = OptList::parse_object("secret,id=s,data=a,,b,").unwrap();
        assert_eq!(
            (list.last("qom-type"), list.last("id"), list.last("data")),
            (Some("secret"), Some("s"), Some("a,b"))
        );
        assert_eq!(
            OptList::parse_object("secret,id=s,data").unwrap_err(),
            "Expected '=' after parameter 'data'"
        );
        assert_eq!(OptList::parse_object(",id=a").unwrap_err(), "Invalid parameter ''");
        assert_eq!(OptList::parse_object("id=a").unwrap().last("qom-type"), None);
    }

    #[test]
    fn names() {
        let (list, warnings) = OptList::parse_name("driver=raw,read-only,nofoo,").unwrap();
        assert_eq!((list.last("read-only"), list.last("foo")), (Some("on"), Some("off")));
        assert_eq!(warnings.len(), 2);
        assert_eq!(warnings[1], "short-form boolean option 'nofoo' deprecated\nPlease use foo=off instead");
        assert!(OptList::parse_name(",a=1").is_err());
    }

    #[test]
    fn the_last_one_counts() {
        let list = OptList::parse_pairs("a=1,b=2,a=3", None).unwrap();
        assert_eq!(list.last("a"), Some("3"));
        assert_eq!(list.last("c"), None);
        assert_eq!(escape_commas("a,b"), "a,,b");
    }
}
