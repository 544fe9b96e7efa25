//! The options of a new image, each of its type.

use super::failure::{CreateFailure, CreateFailureKind};
use super::table::{OptionSpec, amend_options, create_options};
use crate::keyvalue::{KeyValues, Pair};
use crate::scalar::{OptionError, OptionErrorKind, OptionValue};
use qcow2_core::{ImageFormat, Preallocation};
use std::collections::BTreeMap;

/// The options of a new image. Start from [`parse`](Self::parse).
#[derive(Clone, Debug)]
pub struct NewOptions {
    format: ImageFormat,
    values: BTreeMap<&'static str, OptionValue>,
}

impl NewOptions {
    /// Reads `list` by the table of `format`, the defaults of the format in place. Errors: `UnknownOption`,
    /// `Option` for the first one that is not known or not of its type.
    ///
    /// ```
    /// use qcow2_blockdev::{KeyValues, NewOptions};
    /// use qcow2_core::ImageFormat;
    ///
    /// let list = KeyValues::parse_image_options(&["size=1G,lazy_refcounts=on".to_owned()]);
    /// let options = NewOptions::parse(&ImageFormat::Qcow2, &list)?;
    /// assert_eq!((options.number("size"), options.number("cluster_size")), (Some(1 << 30), Some(65536)));
    /// # Ok::<(), qcow2_blockdev::CreateFailure>(())
    /// ```
    pub fn parse(format: &ImageFormat, list: &KeyValues) -> Result<Self, CreateFailure> {
        let failed = |kind: CreateFailureKind| CreateFailure::new(format, kind);
        let mut options = Self { format: format.clone(), values: BTreeMap::new() };
        let table = create_options(format);
        for option in table {
            if let Some(default) = option.default {
                let value = option.read(default).map_err(|error| failed(error.into()))?;
                options.values.insert(option.name, value);
            }
        }
        for Pair { key, value } in list.pairs().iter().filter(|pair| pair.key != "id") {
            let option = table.iter().find(|option| option.name == key);
            let option = option.ok_or_else(|| failed(CreateFailureKind::UnknownOption(key.clone())))?;
            options.values.insert(option.name, option.read(value).map_err(|error| failed(error.into()))?);
        }
        Ok(options)
    }

    /// The format they belong to.
    pub fn format(&self) -> &ImageFormat {
        &self.format
    }

    /// The text of option `name`, if it was given or has a default.
    pub fn text(&self, name: &str) -> Option<&str> {
        match self.values.get(name) {
            Some(OptionValue::Text(text)) => Some(text),
            _ => None,
        }
    }

    /// The number of option `name`, if it was given or has a default.
    pub fn number(&self, name: &str) -> Option<u64> {
        match self.values.get(name) {
            Some(&OptionValue::Number(number)) => Some(number),
            _ => None,
        }
    }

    /// Whether switch `name` is on.
    pub fn switch(&self, name: &str) -> bool {
        matches!(self.values.get(name), Some(OptionValue::Switch(true, _)))
    }

    /// Whether option `name` was given or has a default.
    pub fn given(&self, name: &str) -> bool {
        self.values.contains_key(name)
    }

    /// The options that were given or have a default, in the order of the table.
    pub fn values(&self) -> impl Iterator<Item = (&'static str, &OptionValue)> {
        let value = |option: &OptionSpec| Some((option.name, self.values.get(option.name)?));
        create_options(&self.format).iter().filter_map(value)
    }

    /// Sets a text option.
    pub fn set_text(&mut self, name: &'static str, text: &str) {
        self.values.insert(name, OptionValue::Text(text.to_owned()));
    }

    /// Sets a number option.
    pub fn set_number(&mut self, name: &'static str, number: u64) {
        self.values.insert(name, OptionValue::Number(number));
    }

    /// What is allocated up front. Errors: `NotAChoice`.
    pub fn preallocation(&self) -> Result<Preallocation, OptionError> {
        let Some(text) = self.text("preallocation") else { return Ok(Preallocation::Off) };
        Preallocation::from_name(text).ok_or_else(|| no_such("preallocation", text))
    }
}

/// `value` is none of the choices of `option`.
pub(super) fn no_such(option: &str, value: &str) -> OptionError {
    OptionError::new(option, value, OptionErrorKind::NotAChoice)
}

/// Whether every option in `list` can be changed or is one of a new image, and is of its type.
pub(super) fn could_be_new(format: &ImageFormat, list: &KeyValues) -> bool {
    let of_format = || create_options(format).iter().filter(|option| !option.of_file);
    list.pairs().iter().all(|Pair { key, value }| {
        let mut known = amend_options(format).iter().chain(of_format());
        known.find(|option| option.name == key).is_some_and(|option| option.read(value).is_ok())
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use CreateFailureKind as K;

    fn parse(format: &ImageFormat, text: &str) -> Result<NewOptions, CreateFailure> {
        NewOptions::parse(format, &KeyValues::parse_image_options(&[text.to_owned()]))
    }

    #[track_caller]
    fn check(format: &ImageFormat, text: &str, expected: &str) {
        let options = parse(format, text).unwrap();
        let shown: Vec<String> = options.values().map(|(name, value)| format!("{name} {value:?}")).collect();
        assert_eq!(shown.join(", "), expected);
    }

    #[test]
    fn values_come_in_the_order_of_the_table() {
        check(
            &ImageFormat::Qcow2,
            "nocow=on,lazy_refcounts=yes,refcount_bits=-1,size=1.5k,id=q",
            "cluster_size Number(65536), extended_l2 Switch(false, \"off\"), compression_type Text(\"zlib\"), \
             size Number(1536), lazy_refcounts Switch(true, \"yes\"), refcount_bits Number(18446744073709551615), \
             nocow Switch(true, \"on\")",
        );
        check(
            &ImageFormat::Raw,
            "preallocation=off,size=1M",
            "size Number(1048576), preallocation Text(\"off\")",
        );
    }

    #[test]
    fn unknown_and_mistyped_options() {
        let refused = |text: &str| parse(&ImageFormat::Qcow2, text).unwrap_err().into_kind();
        assert!(matches!(refused("nope=1,size=q"), K::UnknownOption(key) if key == "nope"));
        for (text, expected) in [
            ("lazy_refcounts=ON", OptionErrorKind::NotASwitch),
            ("refcount_bits=16k", OptionErrorKind::NotANumber),
            ("size=-1", OptionErrorKind::SizeOutOfRange),
        ] {
            assert!(matches!(refused(text), K::Option(error) if error.kind == expected), "{text}");
        }
    }
}
