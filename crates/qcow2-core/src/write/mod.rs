//! Guest writes: decided in [`plan`], carried out in [`apply`].

pub(crate) mod apply;
pub(crate) mod attempt;
pub(crate) mod batch;
pub(crate) mod cow;
pub(crate) mod drive;
pub(crate) mod pack;
pub(crate) mod plan;
pub(crate) mod prepare;
pub(crate) mod zero;
