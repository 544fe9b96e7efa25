//! Serves opened disks to other programs.
//!
//! | part | what it is |
//! |---|---|
//! | [`export`] | a disk with what clients may do to it, its meta contexts, and statistics |
//! | [`nbd`] | a server of NBD exports on sockets, with limits and an orderly end |
//!
//! The crate opens no image and prints nothing: disks come opened, and whoever has opened them closes them
//! when the server has ended.

#![forbid(unsafe_code)]

pub mod export;
pub mod nbd;
