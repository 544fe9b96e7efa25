//! Images made to cost time or memory.
