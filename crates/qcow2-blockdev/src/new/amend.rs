//! From options by name to the change of an image.

use super::failure::{CreateFailure, CreateFailureKind};
use super::options::{could_be_new, no_such};
use super::table::amend_options;
use crate::keys::SlotOptions;
use crate::keyvalue::{KeyValues, Pair};
use crate::scalar::OptionValue;
use qcow2_core::ImageFormat;
use qcow2_core::format::Version;
use qcow2_ops::AmendOptions;
use std::collections::BTreeMap;

/// What options change in an image: what [`amend`](qcow2_ops::amend()) takes, and the key slots.
#[derive(Clone, Debug, Default)]
#[non_exhaustive]
pub struct ImageChanges {
    /// What becomes of the image.
    pub options: AmendOptions,
    /// What becomes of its passwords.
    pub slots: SlotOptions,
}

impl ImageChanges {
    /// Reads `list` by the table of what can be changed in an image of `format`; of an option that is given
    /// twice the last one counts. Errors: `UnknownOption`, or `OnlyWhenCreated` if all would be options of a
    /// new image; `Option`.
    pub fn parse(format: &ImageFormat, list: &KeyValues) -> Result<Self, CreateFailure> {
        let changes = read(format, list).and_then(|given| {
            let mut changes = Self::default();
            given.into_iter().try_for_each(|(name, option)| changes.take(name, option))?;
            Ok(changes)
        });
        changes.map_err(|kind| CreateFailure::new(format, kind))
    }

    fn take(&mut self, name: &str, option: OptionValue) -> Result<(), CreateFailureKind> {
        if self.slots.take(name.strip_prefix("encrypt.").unwrap_or(name), &option) {
            return Ok(());
        }
        let options = &mut self.options;
        match (name, option) {
            ("compat", OptionValue::Text(level)) => {
                options.version = Some(match level.as_str() {
                    "0.10" | "v2" => Version::V2,
                    "1.1" | "v3" => Version::V3,
                    other => return Err(no_such("compat", other).into()),
                });
            }
            ("backing_file", OptionValue::Text(name)) => options.backing_file = Some(name),
            ("backing_fmt", OptionValue::Text(name)) => options.backing_format = Some(name),
            ("data_file", OptionValue::Text(name)) => options.data_file = Some(name),
            ("data_file_raw", OptionValue::Switch(on, _)) => options.data_file_raw = Some(on),
            ("lazy_refcounts", OptionValue::Switch(on, _)) => options.lazy_refcounts = Some(on),
            ("refcount_bits", OptionValue::Number(bits)) => options.refcount_bits = Some(bits),
            // As in QEMU, a disk is not made empty so.
            ("size", OptionValue::Number(size)) => options.size = Some(size).filter(|&size| size > 0),
            _ => {}
        }
        Ok(())
    }
}

fn read(
    format: &ImageFormat,
    list: &KeyValues,
) -> Result<BTreeMap<&'static str, OptionValue>, CreateFailureKind> {
    let read = |Pair { key, value }: &Pair| {
        let option = amend_options(format).iter().find(|option| option.name == key);
        let option = option.ok_or_else(|| match could_be_new(format, list) {
            true => CreateFailureKind::OnlyWhenCreated(key.clone()),
            false => CreateFailureKind::UnknownOption(key.clone()),
        })?;
        Ok((option.name, option.read(value)?))
    };
    list.pairs().iter().map(read).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use CreateFailureKind as K;

    fn parse(text: &str) -> Result<ImageChanges, CreateFailure> {
        ImageChanges::parse(&ImageFormat::Qcow2, &KeyValues::parse_image_options(&[text.to_owned()]))
    }

    #[test]
    fn options_by_name() {
        let ImageChanges { options, slots } = parse("compat=v3,size=2M,size=1M").unwrap();
        assert_eq!((options.version, options.size), (Some(Version::V3), Some(1 << 20)));
        assert!(!slots.is_some());
        assert_eq!(parse("size=0").unwrap().options.size, None);
        assert!(parse("encrypt.state=active").unwrap().slots.is_some());
    }

    #[test]
    fn options_that_only_a_new_image_has() {
        let kind = |text: &str| parse(text).unwrap_err().into_kind();
        assert!(matches!(kind("cluster_size=4k"), K::OnlyWhenCreated(key) if key == "cluster_size"));
        assert!(matches!(kind("cluster_size=4k,nope=1"), K::UnknownOption(key) if key == "cluster_size"));
        assert!(matches!(kind("cluster_size=q"), K::UnknownOption(_)));
        assert!(matches!(kind("nocow=on"), K::UnknownOption(_)), "an option of the file");
        assert!(matches!(kind("compat=2"), K::Option(error) if error.option == "compat"));
    }
}
