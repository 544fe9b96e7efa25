//! Reports of the library as people and programs read them: the text that qemu-img prints, and its JSON with
//! the keys in its order. Only turns values into text: nothing is opened, read or printed here.
//!
//! | report | text | JSON |
//! |---|---|---|
//! | [`mod@qcow2_ops::info`] with names | [`info::to_text`] | [`info::to_json`] |
//! | [`mod@qcow2_ops::check`] | [`check::finding`], [`check::to_text`] | [`check::to_json`] |
//! | [`mod@qcow2_ops::map`] | [`map::TextRows`] | [`map::JsonRows`] |
//! | [`mod@qcow2_ops::measure`] | [`measure::to_text`] | [`measure::to_json`] |
//! | [`mod@qcow2_ops::rescue`] | | [`rescue::to_json`] |
//! | [`mod@qcow2_ops::vet`] | (its `Display`) | [`vet::to_json`] |
//!
//! JSON is a [`serde_json::Value`]; [`json::pretty`] lays it out as qemu-img does. Names that come from files
//! are escaped in texts ([`human`]), so that they cannot drive a terminal.
//!
//! ```
//! use qcow2_report::{human, json};
//!
//! assert_eq!(human::size(10752), "10.5 KiB");
//! let value = serde_json::json!({"format": "qcow2"});
//! assert_eq!(json::pretty(&value), "{\n    \"format\": \"qcow2\"\n}\n");
//! ```

#![forbid(unsafe_code)]

pub mod check;
pub mod human;
pub mod info;
pub mod json;
pub mod map;
pub mod measure;
pub mod rescue;
pub mod vet;
