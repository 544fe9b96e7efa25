//! The words of qemu-img, as whom the command also appears: how errors, refusals and warnings of the
//! libraries are put. Scripts read them, so each is QEMU's to the letter where QEMU has one.
//!
//! The libraries' errors say what happened by kinds and fields; here, and nowhere else, a text is made of
//! them.

mod bitmaps;
mod creation;
mod damage;
mod engine;
mod input;
mod keys;
mod name;
mod opening;
mod resizing;
mod text;

pub(crate) use bitmaps::bitmap_refusal;
pub(crate) use creation::{created, measured};
pub(crate) use damage::{DamageWords, speak_own_words};
pub(crate) use engine::{INCONSISTENT_HINT, engine_failure, snapshot_l1, snapshots_cut};
pub(crate) use keys::unlock;
pub(crate) use opening::{
    NATIVE_NEEDS_DIRECT, SHARED_AND_WRITABLE, chain_failure, in_one_line, warning, warning_lines,
};
pub(crate) use resizing::{inconsistent_bitmap, not_resized, resize_refusal};
pub(crate) use text::{capitalized, cause, chain, procedure};
