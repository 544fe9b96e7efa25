//! What a name is made of: drivers with their options, one on another.

mod dictionary;
mod json;
mod node;
mod options;
mod parse;
mod scalar;

pub use dictionary::json_text;
pub(crate) use dictionary::object;
pub use json::JsonError;
pub(crate) use json::parse as parse_json;
pub use node::{Backing, Node};
pub use options::Options;
pub(crate) use parse::{from_options, protocol_below};
pub use scalar::Scalar;
