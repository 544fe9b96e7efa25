//! The upper layers of a backing chain as one disk, without the layers below them.

use qcow2_core::{
    DiskExtent, Error, ErrorKind, ExtentState, GuestDisk, GuestOffset, GuestRange, Result, ZeroMode,
};
use std::sync::Arc;

/// Read-only view of `layers`, top first, each opened without its backing file. Bytes that none of them
/// allocates are unallocated, and reading them is an error. Past the end of a lower layer reads as zeroes, as
/// in the chain.
pub(crate) struct Above {
    layers: Vec<Arc<dyn GuestDisk>>,
}

impl Above {
    /// `layers`: at least one, top first.
    pub(crate) fn new(layers: &[Arc<dyn GuestDisk>]) -> Self {
        Self { layers: layers.to_vec() }
    }

    /// The first layer that allocates the bytes at `range.start()`, and its extent. The extent is cut where a
    /// layer above starts to allocate.
    fn find(&self, range: GuestRange) -> Result<(Option<&Arc<dyn GuestDisk>>, DiskExtent)> {
        let (start, mut len) = (range.start(), range.len());
        for layer in &self.layers {
            let left = layer.size().saturating_sub(start.value());
            if left == 0 {
                return Ok((None, DiskExtent { len, state: ExtentState::Zero { host: None } }));
            }
            let end = GuestOffset::new(start.value() + len.min(left));
            let extent = layer.extent_at(GuestRange::between(start, end))?;
            if extent.state != ExtentState::Unallocated {
                return Ok((Some(layer), extent));
            }
            // A layer above may allocate the bytes after this extent, so the layers below must not answer for
            // them.
            len = extent.len;
        }
        Ok((None, DiskExtent { len, state: ExtentState::Unallocated }))
    }
}

impl GuestDisk for Above {
    fn size(&self) -> u64 {
        self.layers.first().map_or(0, |top| top.size())
    }

    fn read_at(&self, offset: GuestOffset, buf: &mut [u8]) -> Result<()> {
        let (mut at, mut rest) = (offset.value(), buf);
        while !rest.is_empty() {
            let here = GuestOffset::new(at);
            let (layer, extent) =
                self.find(GuestRange::between(here, GuestOffset::new(at + rest.len() as u64)))?;
            let (now, later) = rest.split_at_mut(extent.len as usize);
            match (layer, extent.state) {
                (_, ExtentState::Zero { .. }) => now.fill(0),
                (Some(layer), _) => layer.read_at(here, now)?,
                (None, _) => {
                    let message = format!("guest offset {at:#x} is not allocated in any of these layers");
                    return Err(Error::new(ErrorKind::Resolve, message));
                }
            }
            at += extent.len;
            rest = later;
        }
        Ok(())
    }

    fn extent_at(&self, range: GuestRange) -> Result<DiskExtent> {
        self.find(range).map(|(_, extent)| extent)
    }

    fn cluster_size(&self) -> u64 {
        self.layers.iter().map(|layer| layer.cluster_size()).max().unwrap_or(0)
    }

    fn write_at(&self, _offset: GuestOffset, _buf: &[u8]) -> Result<()> {
        Err(read_only())
    }

    fn write_zeroes(&self, _range: GuestRange, _mode: ZeroMode) -> Result<()> {
        Err(read_only())
    }

    fn discard(&self, _range: GuestRange) -> Result<()> {
        Err(read_only())
    }

    fn flush(&self) -> Result<()> {
        Ok(())
    }

    fn resize(&self, _size: u64) -> Result<()> {
        Err(read_only())
    }
}

fn read_only() -> Error {
    Error::new(ErrorKind::ReadOnly, "this view of the layers is read-only")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::TestDisk;

    #[test]
    fn bytes_come_from_the_first_allocating_layer() {
        let layer = |byte, states: &str| -> Arc<dyn GuestDisk> {
            let disk = TestDisk::data(vec![byte; states.len() * 512]);
            disk.set_states(states);
            Arc::new(disk)
        };
        let above = Above::new(&[layer(1, "d-z---"), layer(2, "ddd-")]);
        let (mut at, mut runs) = (0, String::new());
        while at < above.size() {
            let extent = above
                .extent_at(GuestRange::between(GuestOffset::new(at), GuestOffset::new(above.size())))
                .unwrap();
            runs += match extent.state {
                ExtentState::Unallocated => "-",
                ExtentState::Zero { .. } => "z",
                _ => "d",
            };
            runs += &(extent.len / 512).to_string();
            at += extent.len;
        }
        assert_eq!(runs, "d1d1z1-1z2");
        let mut bytes = vec![9; 3 * 512];
        above.read_at(GuestOffset::new(0), &mut bytes).unwrap();
        assert_eq!(bytes, [vec![1; 512], vec![2; 512], vec![0; 512]].concat());
        assert!(above.read_at(GuestOffset::new(3 * 512), &mut bytes[..1]).is_err());
    }
}
