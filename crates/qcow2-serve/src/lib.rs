//! Serves opened disks to other programs.
//!
//! | part | what it is |
//! |---|---|
//! | [`export`] | a disk with what clients may do to it, its meta contexts, and statistics |
//! | [`nbd`] | a server of NBD exports on sockets, with limits and an orderly end |
//! | [`tool`] | the command line of qemu-nbd, and its words |
//! | `background` | a server that goes on when the command that started it ends |
//!
//! The crate opens no image and prints nothing: disks come opened, and whoever has opened them closes them
//! when the server has ended.

#![forbid(unsafe_code)]

#[cfg(unix)]
pub mod background;
pub mod export;
pub mod nbd;
pub mod tool;
