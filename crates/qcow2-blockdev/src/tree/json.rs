//! JSON in names, as QEMU reads it: texts may stand in single quotes too.

use qcow2_core::format::text::{bytes_of, lone_byte, text_of};
use serde_json::{Map, Number, Value};
use std::collections::VecDeque;
use std::fmt;

/// Why a text is not one JSON value.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum JsonError {
    /// There is none.
    Nothing,
    /// There is more than one.
    SeveralValues,
    /// Brackets stand in one another too deep.
    TooDeep,
    /// It is a value, and no object.
    NotAnObject,
    /// It ends too early.
    Unfinished,
    /// This is no part of JSON; up to the character that makes it so.
    Stray(String),
    /// Something else stands where a value should.
    NoValue,
    /// A word that means nothing.
    UnknownWord(String),
    /// The key of a field is no text.
    KeyNotText,
    /// Between key and value there is no colon.
    NoColon,
    /// A key comes twice.
    DuplicateKey,
    /// Between two fields of an object there is no comma.
    NoCommaInObject,
    /// Between two items of a list there is no comma.
    NoCommaInList,
    /// A backslash with a character that means nothing there.
    UnknownEscape,
    /// A text has bytes that belong to no character.
    NotUtf8,
    /// What follows `\\u` in a text, which is no character.
    NotACharacter(String),
}

impl fmt::Display for JsonError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Nothing => f.write_str("there is no value"),
            Self::SeveralValues => f.write_str("there is more than one value"),
            Self::TooDeep => write!(f, "more than {MAX_DEPTH} brackets stand in one another"),
            Self::NotAnObject => f.write_str("the value is not an object"),
            Self::Unfinished => f.write_str("the value does not end"),
            Self::Stray(text) => write!(f, "'{text}' is no part of a value"),
            Self::NoValue => f.write_str("a value is missing"),
            Self::UnknownWord(word) => write!(f, "the word '{word}' means nothing"),
            Self::KeyNotText => f.write_str("a key is not a text"),
            Self::NoColon => f.write_str("a colon is missing after a key"),
            Self::DuplicateKey => f.write_str("a key comes twice"),
            Self::NoCommaInObject => f.write_str("a comma is missing between fields"),
            Self::NoCommaInList => f.write_str("a comma is missing between items"),
            Self::UnknownEscape => f.write_str("a backslash in a text is followed by the wrong character"),
            Self::NotUtf8 => f.write_str("a text has bytes that belong to no character"),
            Self::NotACharacter(text) => write!(f, "\\u{text} in a text is not a character"),
        }
    }
}

impl std::error::Error for JsonError {}

/// Reads one JSON value.
pub(crate) fn parse(text: &str) -> Result<Value, JsonError> {
    let (mut found, mut rest) = (None, text);
    loop {
        let tokens = next_value(&mut rest);
        let value = match tokens {
            Ok(tokens) if tokens.is_empty() => break,
            Ok(tokens) => Parser { tokens }.value(),
            Err(error) => Err(error),
        };
        match (found.is_some(), value) {
            (true, _) => return Err(JsonError::SeveralValues),
            (false, Ok(value)) => found = Some(value),
            (false, Err(error)) => return Err(error),
        }
    }
    found.ok_or(JsonError::Nothing)
}

/// The smallest pieces.
#[derive(Clone, Debug, PartialEq)]
enum Token {
    /// One of `{}[],:`.
    Mark(char),
    /// With its quotes.
    Text(String),
    Number(String),
    Keyword(String),
}

/// Takes the pieces of one value off `rest`: up to where all brackets are closed. Errors: a piece that is
/// none.
fn next_value(rest: &mut &str) -> Result<VecDeque<Token>, JsonError> {
    let (mut tokens, mut braces, mut brackets) = (VecDeque::new(), 0, 0);
    while let Some(token) = next_token(rest).map_err(JsonError::Stray)? {
        match token {
            Token::Mark('{') => braces += 1,
            Token::Mark('}') => braces -= 1,
            Token::Mark('[') => brackets += 1,
            Token::Mark(']') => brackets -= 1,
            _ => {}
        }
        tokens.push_back(token);
        let open = (braces > 0 || brackets > 0) && braces >= 0 && brackets >= 0;
        if braces + brackets > MAX_DEPTH {
            return Err(JsonError::TooDeep);
        }
        if !open {
            break;
        }
    }
    Ok(tokens)
}

/// Takes one piece off `rest`; none: there is nothing more. Errors: what is none, up to the character that
/// makes it so.
fn next_token(rest: &mut &str) -> Result<Option<Token>, String> {
    *rest = rest.trim_start_matches([' ', '\t', '\r', '\n']);
    let text = *rest;
    let Some(first) = text.chars().next() else { return Ok(None) };
    let (len, make): (usize, fn(String) -> Token) = match first {
        '{' | '}' | '[' | ']' | ',' | ':' => {
            *rest = &text[1..];
            return Ok(Some(Token::Mark(first)));
        }
        '"' | '\'' => (text_len(text, first)?, Token::Text),
        '-' | '0'..='9' => (number_len(text)?, Token::Number),
        'a'..='z' => (text.bytes().take_while(u8::is_ascii_lowercase).count(), Token::Keyword),
        _ => return Err(first.to_string()),
    };
    let (token, after) = text.split_at(len);
    *rest = after;
    Ok(Some(make(token.to_owned())))
}

/// Bytes of the text at the beginning of `text`, with its quotes. Errors: up to a control character, or all
/// of it.
fn text_len(text: &str, quote: char) -> Result<usize, String> {
    let mut escaped = false;
    for (at, c) in text.char_indices().skip(1) {
        // The two bytes with which no character of any UTF-8 begins are no part of a text at all.
        if c < ' ' || lone_byte(c).is_some_and(|byte| byte >= 0xfe) {
            return Err(text[..at + c.len_utf8()].to_owned());
        }
        match c {
            _ if escaped => escaped = false,
            '\\' => escaped = true,
            _ if c == quote => return Ok(at + 1),
            _ => {}
        }
    }
    Err(text.to_owned())
}

/// Bytes of the number at the beginning of `text`. Errors: up to the character that is wrong in it.
fn number_len(text: &str) -> Result<usize, String> {
    let bytes = text.as_bytes();
    let wrong = |at: usize| {
        let end = text[at..].chars().next().map_or(at, |c| at + c.len_utf8());
        Err(text[..end].to_owned())
    };
    let digit = |at: usize| bytes.get(at).is_some_and(u8::is_ascii_digit);
    let digits =
        |at: usize| at + bytes[at.min(bytes.len())..].iter().take_while(|b| b.is_ascii_digit()).count();
    let start = usize::from(bytes[0] == b'-');
    let mut at = match bytes.get(start) {
        Some(b'0') if digit(start + 1) => return wrong(start + 1),
        Some(b'0') => start + 1,
        Some(b'1'..=b'9') => digits(start),
        _ => return wrong(start),
    };
    if bytes.get(at) == Some(&b'.') {
        if !digit(at + 1) {
            return wrong(at + 1);
        }
        at = digits(at + 1);
    }
    if matches!(bytes.get(at), Some(b'e' | b'E')) {
        let sign = usize::from(matches!(bytes.get(at + 1), Some(b'+' | b'-')));
        if !digit(at + 1 + sign) {
            return wrong(at + 1 + sign);
        }
        at = digits(at + 1 + sign);
    }
    Ok(at)
}

struct Parser {
    tokens: VecDeque<Token>,
}

impl Parser {
    fn next(&mut self) -> Result<Token, JsonError> {
        self.tokens.pop_front().ok_or(JsonError::Unfinished)
    }

    fn value(&mut self) -> Result<Value, JsonError> {
        match self.next()? {
            Token::Mark('{') => self.object(),
            Token::Mark('[') => self.array(),
            Token::Mark(_) => Err(JsonError::NoValue),
            Token::Text(text) => unquoted(&text).map(Value::String),
            Token::Number(text) => Ok(number(&text)),
            Token::Keyword(word) => match &*word {
                "true" => Ok(Value::Bool(true)),
                "false" => Ok(Value::Bool(false)),
                "null" => Ok(Value::Null),
                _ => Err(JsonError::UnknownWord(word)),
            },
        }
    }

    fn object(&mut self) -> Result<Value, JsonError> {
        let mut fields = Map::new();
        if self.tokens.front() == Some(&Token::Mark('}')) {
            self.next()?;
            return Ok(Value::Object(fields));
        }
        loop {
            if self.tokens.is_empty() {
                return Err(JsonError::Unfinished);
            }
            let Value::String(key) = self.value()? else {
                return Err(JsonError::KeyNotText);
            };
            if self.next()? != Token::Mark(':') {
                return Err(JsonError::NoColon);
            }
            let value = self.value()?;
            if fields.insert(key, value).is_some() {
                return Err(JsonError::DuplicateKey);
            }
            match self.next()? {
                Token::Mark('}') => return Ok(Value::Object(fields)),
                Token::Mark(',') => {}
                _ => return Err(JsonError::NoCommaInObject),
            }
        }
    }

    fn array(&mut self) -> Result<Value, JsonError> {
        let mut items = Vec::new();
        if self.tokens.front() == Some(&Token::Mark(']')) {
            self.next()?;
            return Ok(Value::Array(items));
        }
        loop {
            items.push(self.value()?);
            match self.next()? {
                Token::Mark(']') => return Ok(Value::Array(items)),
                Token::Mark(',') => {}
                _ => return Err(JsonError::NoCommaInList),
            }
        }
    }
}

/// An integer where it is one that fits, else a fraction.
fn number(text: &str) -> Value {
    let integer = text.parse::<i64>().map(Number::from).or_else(|_| text.parse::<u64>().map(Number::from));
    match integer {
        Ok(number) => Value::Number(number),
        Err(_) => text.parse().ok().and_then(Number::from_f64).map_or(Value::Null, Value::Number),
    }
}

/// What a text in quotes says.
fn unquoted(text: &str) -> Result<String, JsonError> {
    let inner = &text[1..text.len() - 1];
    if std::str::from_utf8(&bytes_of(inner)).is_err() {
        return Err(JsonError::NotUtf8);
    }
    let (mut out, mut rest) = (String::with_capacity(inner.len()), inner.chars());
    while let Some(c) = rest.next() {
        if c != '\\' {
            out.push(c);
            continue;
        }
        out.push(match rest.next() {
            Some(c @ ('"' | '\'' | '\\' | '/')) => c,
            Some('b') => '\u{8}',
            Some('f') => '\u{c}',
            Some('n') => '\n',
            Some('r') => '\r',
            Some('t') => '\t',
            Some('u') => {
                // Whatever it is, it is a character, and stands for no byte of a name.
                let c = unicode(&mut rest)?;
                out.push_str(&text_of(c.encode_utf8(&mut [0; 4]).as_bytes()));
                continue;
            }
            _ => return Err(JsonError::UnknownEscape),
        });
    }
    Ok(out)
}

/// The character that follows `\u`, of two halves where it begins with the first of them. `rest`: up to the
/// closing quote.
fn unicode(rest: &mut std::str::Chars<'_>) -> Result<char, JsonError> {
    let text = rest.as_str();
    let unit = |at: usize| {
        let digits = text.get(at..at + 4).filter(|digits| digits.bytes().all(|b| b.is_ascii_hexdigit()));
        digits.and_then(|digits| u32::from_str_radix(digits, 16).ok())
    };
    let (mut code, mut len) = (unit(0), 4);
    if let Some(first) = code.filter(|first| (0xd800..0xdc00).contains(first))
        && text[4..].starts_with("\\u")
        && let Some(second) = unit(6).filter(|second| (0xdc00..0xe000).contains(second))
    {
        (code, len) = (Some(0x10000 + ((first & 0x3ff) << 10 | (second & 0x3ff))), 10);
    }
    let is_character = |c: &char| {
        let code = u32::from(*c);
        code & 0xfffe != 0xfffe && !(0xfdd0..0xfdf0).contains(&code)
    };
    let Some(c) = code.and_then(char::from_u32).filter(is_character) else {
        // The quote that ends the text is shown too, where there are not enough characters.
        let shown: String = text.chars().chain(['"']).take(4).collect();
        return Err(JsonError::NotACharacter(shown));
    };
    rest.nth(len - 1);
    Ok(c)
}

/// Brackets around one value, at most.
const MAX_DEPTH: i32 = 1024;

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn values() {
        for (text, value) in [
            (" {\"a\": [1, -2, 1.5e1], 'b': 'x\"y'}\n", json!({"a": [1, -2, 15.0], "b": "x\"y"})),
            (r#"{"a":"\u0041\ud83d\ude00\/\'"}"#, json!({"a": "A\u{1f600}/'"})),
            ("18446744073709551615", json!(u64::MAX)),
            ("[]", json!([])),
            ("{}", json!({})),
            ("null", json!(null)),
        ] {
            assert_eq!(parse(text), Ok(value), "{text}");
        }
    }

    #[test]
    fn mistakes() {
        for (text, why) in [
            ("", JsonError::Nothing),
            ("{} x", JsonError::SeveralValues),
            ("{", JsonError::Unfinished),
            ("nope", JsonError::UnknownWord("nope".to_owned())),
            ("{\"a\":}", JsonError::NoValue),
            ("{\"a\":1,}", JsonError::NoValue),
            ("{\"a\":1,'a':2}", JsonError::DuplicateKey),
            ("{\"a\" 1}", JsonError::NoColon),
            ("{1:2}", JsonError::KeyNotText),
            ("{'a':1 'b':2}", JsonError::NoCommaInObject),
            ("[1 2]", JsonError::NoCommaInList),
            ("{a:-c}", JsonError::Stray("-c".to_owned())),
            ("{\"a\":01}", JsonError::Stray("01".to_owned())),
            ("{\"a\":1.}", JsonError::Stray("1.}".to_owned())),
            ("{\"a\":1e", JsonError::Stray("1e".to_owned())),
            ("{\"a", JsonError::Stray("\"a".to_owned())),
            ("%", JsonError::Stray("%".to_owned())),
            (r#""\ud800""#, JsonError::NotACharacter("d800".to_owned())),
            (r#""\u00""#, JsonError::NotACharacter("00\"".to_owned())),
            (r#""\ufffe""#, JsonError::NotACharacter("fffe".to_owned())),
            (r#""\x""#, JsonError::UnknownEscape),
        ] {
            assert_eq!(parse(text), Err(why), "{text}");
        }
    }
}
