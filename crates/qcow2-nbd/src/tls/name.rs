//! The subject of a certificate as text, as GnuTLS writes it: `C=GB,O=Example,CN=client`.

use std::fmt::Write;

/// The name of the subject of a certificate (X.509, DER), in the order in which it stands there and escaped
/// as in RFC 4514. `None`: it is no certificate.
pub(super) fn subject(certificate: &[u8]) -> Option<String> {
    let (certificate, _) = expect(certificate, SEQUENCE)?;
    let (signed, _) = expect(certificate, SEQUENCE)?;
    // Version, serial number, algorithm, issuer, validity.
    let rest = match element(signed)? {
        (VERSION, _, rest) => rest,
        _ => signed,
    };
    let (_, rest) = expect(rest, INTEGER)?;
    let (_, rest) = expect(rest, SEQUENCE)?;
    let (_, rest) = expect(rest, SEQUENCE)?;
    let (_, rest) = expect(rest, SEQUENCE)?;
    let (mut names, _) = expect(rest, SEQUENCE)?;
    let mut text = String::new();
    while !names.is_empty() {
        let (mut parts, rest) = expect(names, SET)?;
        names = rest;
        let mut separator = ",";
        while !parts.is_empty() {
            let (part, rest) = expect(parts, SEQUENCE)?;
            parts = rest;
            if !text.is_empty() {
                text.push_str(separator);
            }
            separator = "+";
            attribute(part, &mut text)?;
        }
    }
    Some(text)
}

fn attribute(part: &[u8], text: &mut String) -> Option<()> {
    let (oid, value) = expect(part, OID)?;
    let known = ATTRIBUTES.iter().find(|(known, _)| *known == oid);
    let (kind, bytes, _) = element(value)?;
    let readable = known.and_then(|_| readable(kind, bytes));
    match known {
        Some((_, name)) => text.push_str(name),
        None => dotted(oid, text)?,
    }
    text.push('=');
    match readable {
        Some(value) => escape(&value, text),
        None => {
            text.push('#');
            for byte in value {
                // Writing to text cannot fail.
                let _ = write!(text, "{byte:02x}");
            }
        }
    }
    Some(())
}

fn readable(kind: u8, bytes: &[u8]) -> Option<String> {
    match kind {
        UTF8_STRING | NUMERIC_STRING | PRINTABLE_STRING | TELETEX_STRING | IA5_STRING => {
            std::str::from_utf8(bytes).ok().map(str::to_owned)
        }
        BMP_STRING if bytes.len().is_multiple_of(2) => {
            let units: Vec<u16> =
                bytes.chunks_exact(2).map(|pair| u16::from_be_bytes([pair[0], pair[1]])).collect();
            String::from_utf16(&units).ok()
        }
        _ => None,
    }
}

fn escape(value: &str, text: &mut String) {
    let last = value.chars().count().saturating_sub(1);
    for (at, c) in value.chars().enumerate() {
        match c {
            '\0' => text.push_str("\\00"),
            ',' | '+' | '"' | '\\' | '<' | '>' | ';' => text.extend(['\\', c]),
            '#' if at == 0 => text.push_str("\\#"),
            ' ' if at == 0 || at == last => text.push_str("\\ "),
            c => text.push(c),
        }
    }
}

/// Appends an object identifier as numbers. `None`: it is none.
fn dotted(oid: &[u8], text: &mut String) -> Option<()> {
    let mut number = 0u64;
    let mut is_first = true;
    for byte in oid {
        number = number.checked_mul(128)? | u64::from(byte & 0x7f);
        if byte & 0x80 != 0 {
            continue;
        }
        // Writing to text cannot fail.
        let _ = if is_first {
            let top = (number / 40).min(2);
            write!(text, "{top}.{}", number - top * 40)
        } else {
            write!(text, ".{number}")
        };
        (number, is_first) = (0, false);
    }
    Some(())
}

/// The content of the element that `bytes` begins with, which must be of the kind `tag`, and what follows it.
fn expect(bytes: &[u8], tag: u8) -> Option<(&[u8], &[u8])> {
    let (found, content, rest) = element(bytes)?;
    (found == tag).then_some((content, rest))
}

/// The tag and the content of the element that `bytes` begins with, and what follows it.
fn element(bytes: &[u8]) -> Option<(u8, &[u8], &[u8])> {
    let (&[tag, first], rest) = bytes.split_first_chunk()?;
    let (len, rest) = match first {
        0..=0x7f => (usize::from(first), rest),
        0x81..=0x83 => {
            let (len, rest) = rest.split_at_checked(usize::from(first & 0x7f))?;
            (len.iter().fold(0, |len, byte| len << 8 | usize::from(*byte)), rest)
        }
        _ => return None,
    };
    let (content, rest) = rest.split_at_checked(len)?;
    Some((tag, content, rest))
}

const INTEGER: u8 = 0x02;
const OID: u8 = 0x06;
const UTF8_STRING: u8 = 0x0c;
const NUMERIC_STRING: u8 = 0x12;
const PRINTABLE_STRING: u8 = 0x13;
const TELETEX_STRING: u8 = 0x14;
const IA5_STRING: u8 = 0x16;
const BMP_STRING: u8 = 0x1e;
const SEQUENCE: u8 = 0x30;
const SET: u8 = 0x31;
/// The optional first part of a certificate.
const VERSION: u8 = 0xa0;

/// Attributes that have a name.
const ATTRIBUTES: [(&[u8], &str); 23] = [
    (&[0x55, 4, 3], "CN"),
    (&[0x55, 4, 4], "surName"),
    (&[0x55, 4, 5], "serialNumber"),
    (&[0x55, 4, 6], "C"),
    (&[0x55, 4, 7], "L"),
    (&[0x55, 4, 8], "ST"),
    (&[0x55, 4, 9], "street"),
    (&[0x55, 4, 10], "O"),
    (&[0x55, 4, 11], "OU"),
    (&[0x55, 4, 12], "title"),
    (&[0x55, 4, 13], "description"),
    (&[0x55, 4, 15], "businessCategory"),
    (&[0x55, 4, 17], "postalCode"),
    (&[0x55, 4, 41], "name"),
    (&[0x55, 4, 42], "givenName"),
    (&[0x55, 4, 43], "initials"),
    (&[0x55, 4, 44], "generationQualifier"),
    (&[0x55, 4, 46], "dnQualifier"),
    (&[0x55, 4, 65], "pseudonym"),
    (&[0x09, 0x92, 0x26, 0x89, 0x93, 0xf2, 0x2c, 0x64, 1, 1], "UID"),
    (&[0x09, 0x92, 0x26, 0x89, 0x93, 0xf2, 0x2c, 0x64, 1, 25], "DC"),
    (&[0x2a, 0x86, 0x48, 0x86, 0xf7, 0x0d, 1, 9, 1], "EMAIL"),
    (&[0x2b, 6, 1, 4, 1, 0x82, 0x37, 60, 2, 1, 3], "jurisdictionOfIncorporationCountryName"),
];

#[cfg(test)]
mod tests {
    use super::*;

    /// An element of less than 128 bytes, or a longer one.
    fn der(tag: u8, parts: &[Vec<u8>]) -> Vec<u8> {
        let content = parts.concat();
        let len = content.len();
        let head =
            if len < 128 { vec![tag, len as u8] } else { vec![tag, 0x82, (len >> 8) as u8, len as u8] };
        [head, content].concat()
    }

    fn part(oid: &[u8], kind: u8, value: &[u8]) -> Vec<u8> {
        der(SEQUENCE, &[der(OID, &[oid.to_vec()]), der(kind, &[value.to_vec()])])
    }

    fn certificate(names: &[Vec<u8>]) -> Vec<u8> {
        let nothing = || der(SEQUENCE, &[]);
        let (version, serial) = (der(VERSION, &[der(INTEGER, &[vec![2]])]), der(INTEGER, &[vec![1]]));
        let names = der(SEQUENCE, names);
        let signed = der(SEQUENCE, &[version, serial, nothing(), nothing(), nothing(), names, nothing()]);
        der(SEQUENCE, &[signed, nothing(), nothing()])
    }

    #[track_caller]
    fn check(names: &[Vec<u8>], expected: &str) {
        assert_eq!(subject(&certificate(names)).as_deref(), Some(expected));
    }

    /// As qemu-nbd's GnuTLS calls certificates with the same subjects.
    #[test]
    fn names_in_their_order_and_escaped() {
        let one = |oid: &[u8], kind, value: &[u8]| der(SET, &[part(oid, kind, value)]);
        check(
            &[one(&[0x55, 4, 6], PRINTABLE_STRING, b"GB"), one(&[0x55, 4, 3], UTF8_STRING, b"a.example.com")],
            "C=GB,CN=a.example.com",
        );
        check(&[one(&[0x55, 4, 3], UTF8_STRING, b" lead and trail ")], "CN=\\ lead and trail\\ ");
        check(&[one(&[0x55, 4, 3], UTF8_STRING, b"#h,a\0")], "CN=\\#h\\,a\\00");
        check(
            &[der(SET, &[part(&[0x55, 4, 5], UTF8_STRING, b"7"), part(&[0x55, 4, 11], UTF8_STRING, b"x")])],
            "serialNumber=7+OU=x",
        );
        check(&[one(&[0x55, 4, 97], UTF8_STRING, b"oi")], "2.5.4.97=#0c026f69");
        check(&[one(&[0x55, 4, 3], BMP_STRING, &[0, b'Z', 0, 0xeb])], "CN=Z\u{eb}");
        check(&[one(&[0x55, 4, 3], UTF8_STRING, &[0xff])], "CN=#0c01ff");
        check(&[], "");
    }

    /// Neither a cut nor a changed byte leads to a panic.
    #[test]
    fn damaged_certificates() {
        let whole = certificate(&[der(SET, &[part(&[0x55, 4, 3], UTF8_STRING, b"name")])]);
        for at in 0..whole.len() {
            assert_eq!(subject(&whole[..at]), None);
            for change in [0x01, 0x7f, 0x80, 0xff] {
                let mut changed = whole.clone();
                changed[at] ^= change;
                let _ = subject(&changed);
            }
        }
        assert_eq!(subject(&[SEQUENCE, 0x84, 0xff, 0xff, 0xff, 0xff, 0]), None);
        let mut text = String::new();
        assert_eq!(dotted(&[0xff; 11], &mut text), None);
    }
}
