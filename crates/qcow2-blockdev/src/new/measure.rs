//! From options by name to those of a measurement.

use super::failure::{CreateFailure, CreateFailureKind};
use super::options::{NewOptions, no_such};
use crate::keys::Secrets;
use qcow2_core::format::Version;
use qcow2_core::{ImageFormat, Refusal};
use qcow2_ops::measure::{MeasureOptions, MeasureTarget};

impl NewOptions {
    /// What [`measure`](qcow2_ops::measure::measure()) measures for, known to be possible. Errors: the first
    /// one in QEMU's order, the options of encryption last.
    pub fn measure_target(&self, secrets: &Secrets) -> Result<MeasureTarget, CreateFailure> {
        Ok(match self.format() {
            ImageFormat::Qcow2 => {
                let options = qcow2(self).map_err(|kind| CreateFailure::new(self.format(), kind))?;
                MeasureTarget::Qcow2(options.with_luks_len(self.luks_header_len(secrets)?))
            }
            ImageFormat::Luks => MeasureTarget::Container { area_len: self.luks_header_len(secrets)? },
            ImageFormat::Raw => MeasureTarget::Raw,
            format => {
                return Err(CreateFailure::new(format, CreateFailureKind::NoMeasurement));
            }
        })
    }
}

fn qcow2(options: &NewOptions) -> Result<MeasureOptions, CreateFailureKind> {
    let mut wanted = MeasureOptions::default();
    wanted.cluster_size = options.number("cluster_size").unwrap_or(wanted.cluster_size);
    wanted.refcount_bits = options.number("refcount_bits").unwrap_or(wanted.refcount_bits);
    wanted.extended_l2 = options.switch("extended_l2");
    wanted.has_backing = options.text("backing_file").is_some();
    // Unlike a new image it takes no other names of the versions.
    let (version, unknown) = match options.text("compat") {
        None | Some("1.1") => (Version::V3, None),
        Some("0.10") => (Version::V2, None),
        Some(other) => (Version::V3, Some(no_such("compat", other))),
    };
    wanted.version = version;
    // Clusters are looked at before the version, refcounts after it.
    match (wanted.check(), unknown) {
        (Err(refusal @ (Refusal::ClusterSize(_) | Refusal::ExtendedL2ClusterSize(_))), _)
        | (Err(refusal), None) => return Err(CreateFailureKind::Refused(refusal)),
        (_, Some(unknown)) => return Err(unknown.into()),
        (Ok(()), None) => {}
    }
    wanted.preallocation = options.preallocation()?;
    Ok(wanted)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::keyvalue::KeyValues;

    fn target(format: &ImageFormat, text: &str) -> Result<MeasureTarget, CreateFailure> {
        let list = KeyValues::parse_image_options(&[text.to_owned()]);
        NewOptions::parse(format, &list)?.measure_target(&Secrets::default())
    }

    #[test]
    fn options_count() {
        let options = MeasureOptions::default().with_version(Version::V2).with_cluster_size(4096);
        let seen = target(&ImageFormat::Qcow2, "compat=0.10,cluster_size=4k,backing_file=b").unwrap();
        assert_eq!(seen, MeasureTarget::Qcow2(options.with_backing(true)));
        assert_eq!(target(&ImageFormat::Raw, "size=1M").unwrap(), MeasureTarget::Raw);
    }

    #[test]
    fn the_first_fault_is_the_one_qemu_reports() {
        let refused = |text: &str| target(&ImageFormat::Qcow2, text).unwrap_err().into_kind();
        let kind = refused("cluster_size=3,compat=v3");
        assert!(matches!(kind, CreateFailureKind::Refused(Refusal::ClusterSize(3))));
        let kind = refused("refcount_bits=3,compat=v3");
        assert!(matches!(kind, CreateFailureKind::Option(error) if error.option == "compat"));
        let kind = refused("refcount_bits=8,compat=0.10,preallocation=q");
        assert!(matches!(kind, CreateFailureKind::Refused(Refusal::RefcountBitsNeedVersion3(8))));
        let kind = refused("preallocation=q");
        assert!(matches!(kind, CreateFailureKind::Option(error) if error.option == "preallocation"));
    }
}
