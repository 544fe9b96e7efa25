//! LUKS version 1: the header, its eight key slots and the volume's master key.
//!
//! | location | content |
//! |---|---|
//! | bytes 0..592 | the header, see `qcow2_format::crypt` |
//! | from sector 8 | key material of slot 0, then of slots 1 to 7, each at a multiple of 4096 bytes |
//! | payload offset | data of a container; inside qcow2 the area ends here |
//!
//! A slot holds the volume's key, spread over 4000 stripes (`split`) and encrypted under a key derived from a
//! password. Spec: LUKS On-Disk Format Specification 1.2.

mod change;
mod create;
mod slots;
mod split;
mod unlock;
mod volume;

#[cfg(test)]
mod tests;

pub use change::{NewPassword, add_password, erase_passwords};
pub use create::{NewVolume, count_iterations, create};
pub use slots::{SlotChange, SlotsToErase, put_key};
pub use unlock::{DEFAULT_ITERATION_LIMIT, IterationLimit};
pub use volume::Volume;
