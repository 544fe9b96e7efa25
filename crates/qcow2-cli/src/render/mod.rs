//! Reports to text. The only place with serial forms.

pub(crate) mod check;
pub(crate) mod human;
pub(crate) mod info;
pub(crate) mod json;
pub(crate) mod map;
pub(crate) mod rescue;
