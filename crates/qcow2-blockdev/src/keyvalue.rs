//! Lists of `key=value,key=value`, where `,,` in a value stands for one comma.

use std::fmt;

/// One `key=value`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Pair {
    /// Before the first `=`.
    pub key: String,
    /// After it.
    pub value: String,
}

/// A switch that was given without its value, which is deprecated.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ShortForm {
    /// As it was given.
    pub item: String,
    /// What it means.
    pub long: Pair,
}

/// Why a text is not such a list.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum KeyValueError {
    /// Nothing stands before a `=`, or an item is empty.
    NoKey,
    /// This item has no `=`.
    NoValue(String),
    /// This list is empty, or begins or ends with a lone comma.
    EmptyEnd(String),
}

impl fmt::Display for KeyValueError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NoKey => f.write_str("an item of the list has no key"),
            Self::NoValue(item) => write!(f, "'{item}' has no value"),
            Self::EmptyEnd(list) => write!(f, "'{list}' begins or ends with an empty item"),
        }
    }
}

impl std::error::Error for KeyValueError {}

/// An option string, taken apart. The same key may come again; the last one counts.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct KeyValues {
    pairs: Vec<Pair>,
    /// The first word that asks for help, and the number of pairs before it.
    help: Option<(String, usize)>,
}

impl KeyValues {
    /// Lets through a list that has no empty end, and so can be joined with others.
    pub fn checked(text: String) -> Result<String, KeyValueError> {
        if text.is_empty() || text.starts_with(',') || ends_in_lone_comma(&text) {
            return Err(KeyValueError::EmptyEnd(text));
        }
        Ok(text)
    }

    /// Reads the options of a new image, in the order given. A lone `key` means `key=on` and a lone `nokey`
    /// means `key=off`; a lone `help` or `?` asks for help.
    pub fn parse_image_options(texts: &[String]) -> Self {
        let mut list = Self::default();
        for text in texts {
            for item in split(text) {
                match item.split_once('=') {
                    Some((key, value)) => list.push(key, value),
                    None if item == "help" || item == "?" => {
                        list.help.get_or_insert((item, list.pairs.len()));
                    }
                    None => match item.strip_prefix("no") {
                        Some(key) => list.push(key, "off"),
                        None => list.push(&item, "on"),
                    },
                }
            }
        }
        list
    }

    /// Reads `key=value` pairs only; `implied`: the key of a first item without one. Errors: an
    /// item that is no pair.
    pub fn parse_pairs(text: &str, implied: Option<&str>) -> Result<Self, KeyValueError> {
        Self::parse_each(text, implied, false)
    }

    /// The same where a lone `help` or `?` asks for help, the first item too.
    pub fn parse_pairs_or_help(text: &str, implied: Option<&str>) -> Result<Self, KeyValueError> {
        Self::parse_each(text, implied, true)
    }

    fn parse_each(text: &str, implied: Option<&str>, helps: bool) -> Result<Self, KeyValueError> {
        let mut list = Self::default();
        for (index, item) in split(text).iter().enumerate() {
            match (item.split_once('='), implied) {
                (None, _) if helps && matches!(&**item, "help" | "?") => {
                    list.help.get_or_insert((item.clone(), list.pairs.len()));
                }
                (Some(("", _)), _) => return Err(KeyValueError::NoKey),
                (Some((key, value)), _) => list.push(key, value),
                (None, Some(implied)) if index == 0 && !item.is_empty() => list.push(implied, item),
                (None, _) if item.is_empty() && index > 0 => {}
                (None, _) if item.is_empty() => return Err(KeyValueError::NoKey),
                (None, _) => return Err(KeyValueError::NoValue(item.clone())),
            }
        }
        Ok(list)
    }

    /// Reads the option string of an image, in which a lone `key` is `key=on` and a lone `nokey` is
    /// `key=off`. With the list come those that were so short. Errors: an item without a key.
    pub fn parse_name(text: &str) -> Result<(Self, Vec<ShortForm>), KeyValueError> {
        let (mut list, mut short) = (Self::default(), Vec::new());
        for (index, item) in split(text).iter().enumerate() {
            match item.split_once('=') {
                Some(("", _)) => return Err(KeyValueError::NoKey),
                Some((key, value)) => list.push(key, value),
                None if item.is_empty() && index > 0 => {}
                None if item.is_empty() => return Err(KeyValueError::NoKey),
                None => {
                    let (key, value) = item.strip_prefix("no").map_or((&**item, "on"), |key| (key, "off"));
                    list.push(key, value);
                    let (key, value) = (key.to_owned(), value.to_owned());
                    short.push(ShortForm { item: item.clone(), long: Pair { key, value } });
                }
            }
        }
        Ok((list, short))
    }

    /// Whether help was asked for.
    pub fn asks_help(&self) -> bool {
        self.help.is_some()
    }

    /// The same list for who gives no help: the word that asks for it is a key like others, in its place.
    #[must_use]
    pub fn without_help(mut self) -> Self {
        if let Some((key, at)) = self.help.take() {
            self.pairs.insert(at, Pair { key, value: "on".to_owned() });
        }
        self
    }

    /// All pairs in order.
    pub fn pairs(&self) -> &[Pair] {
        &self.pairs
    }

    /// The value that counts for `key`.
    pub fn last(&self, key: &str) -> Option<&str> {
        self.pairs.iter().rev().find(|pair| pair.key == key).map(|pair| pair.value.as_str())
    }

    /// Takes every pair of `key` out; the value that counted for it.
    pub fn take(&mut self, key: &str) -> Option<String> {
        let taken = self.last(key).map(str::to_owned);
        self.pairs.retain(|pair| pair.key != key);
        taken
    }

    pub(crate) fn push(&mut self, key: &str, value: &str) {
        self.pairs.push(Pair { key: key.to_owned(), value: value.to_owned() });
    }
}

/// `value` as it stands in an option string.
pub fn escape_commas(value: &str) -> String {
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
        let list = KeyValues::parse_image_options(&texts);
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
    fn a_word_that_asks_for_help_keeps_its_place_as_a_key() {
        for (texts, keys) in [
            (["a=1,?,b=2", "help"], &["a", "?", "b"][..]),
            (["help", "a=1"], &["help", "a"]),
            (["a=1", "b=1"], &["a", "b"]),
        ] {
            let list = KeyValues::parse_image_options(&texts.map(str::to_owned)).without_help();
            assert_eq!(list.pairs().iter().map(|pair| &*pair.key).collect::<Vec<_>>(), keys);
            assert!(!list.asks_help());
        }
    }

    #[test]
    fn image_options_that_cannot_be_joined() {
        for text in ["", ",a=1", "a=1,", "a=1,,,", "help,", ",help"] {
            let error = KeyValues::checked(text.to_owned()).unwrap_err();
            assert_eq!(error, KeyValueError::EmptyEnd(text.to_owned()));
        }
        assert!(KeyValues::checked("a=1,,".to_owned()).is_ok());
    }

    #[test]
    fn objects() {
        let object = |text| KeyValues::parse_pairs(text, Some("qom-type"));
        let list = object("secret,id=s,data=a,,b,").unwrap();
        assert_eq!(
            (list.last("qom-type"), list.last("id"), list.last("data")),
            (Some("secret"), Some("s"), Some("a,b"))
        );
        assert_eq!(object("secret,id=s,data").unwrap_err(), KeyValueError::NoValue("data".to_owned()));
        assert_eq!(object(",id=a").unwrap_err(), KeyValueError::NoKey);
        assert_eq!(object("id=a").unwrap().last("qom-type"), None);
    }

    #[test]
    fn names() {
        let (list, short) = KeyValues::parse_name("driver=raw,read-only,nofoo,").unwrap();
        assert_eq!((list.last("read-only"), list.last("foo")), (Some("on"), Some("off")));
        let long = Pair { key: "foo".to_owned(), value: "off".to_owned() };
        assert_eq!(short.len(), 2);
        assert_eq!(short[1], ShortForm { item: "nofoo".to_owned(), long });
        assert!(KeyValues::parse_name(",a=1").is_err());
    }

    #[test]
    fn the_last_one_counts() {
        let list = KeyValues::parse_pairs("a=1,b=2,a=3", None).unwrap();
        assert_eq!(list.last("a"), Some("3"));
        assert_eq!(list.last("c"), None);
        assert_eq!(escape_commas("a,b"), "a,,b");
    }
}
