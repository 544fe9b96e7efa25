//! Serves opened disks to other programs.
//!
//! | part | what it is |
//! |---|---|
//! | [`export`] | a disk with what clients may do to it, its meta contexts, and statistics |
//! | [`control`] | a socket through which the disks are changed while they are served |
//! | `local` | unix sockets, which replace those that a killed server left |
//! | [`nbd`] | a server of NBD exports on sockets, with limits and an orderly end |
//! | [`tool`] | the command line of qemu-nbd, and its words |
//! | `background` | a server that goes on when the command that started it ends |
//!
//! Nothing is printed. Disks come opened, and whoever has opened them closes them when the server has ended;
//! only [`control`] opens files, the layers that its commands are about.

#![forbid(unsafe_code)]

#[cfg(unix)]
pub mod background;
pub mod control;
pub mod export;
pub mod local;
pub mod nbd;
pub mod tool;
