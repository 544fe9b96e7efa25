//! Changes of disks that are served, through a socket.
//!
//! A client sends one JSON object per line and gets one line for each, in order; events may come before it.
//!
//! ```text
//! {"command": "snapshot", "file": "monday.qcow2"}
//! {"return": {"top": "monday.qcow2", "below": "disk.qcow2", "pause-ns": 412345}}
//! {"command": "commit"}
//! {"event": "progress", "done": 1048576, "total": 4194304}
//! {"return": {"top": "disk.qcow2", "retired": "monday.qcow2", "pause-ns": 398765}}
//! {"command": "bitmap-clear", "bitmap": "b"}
//! {"error": "changing the bitmap: no bitmap 'b'"}
//! ```
//!
//! `pause-ns` is how long requests were held back at last. With several disks, `"disk"` names the export. A
//! member `"id"` of any kind comes back in the answer.
//!
//! | command | members | what happens |
//! |---|---|---|
//! | `query` | | the files of each disk, from the top down, with their formats and sizes |
//! | `statistics` | | what clients have done, with latencies |
//! | `metrics` | | the same as text for Prometheus |
//! | `snapshot` | `file` | the disk stays as it is in its file, and goes on in the new overlay `file` |
//! | `commit` | `depth` (0) | the layer below `depth` others is merged into the one below it |
//! | `snapshot-save`, `snapshot-delete` | `name` | a snapshot inside the top file |
//! | `snapshot-list` | | the snapshots inside the top file |
//! | `bitmap-add` | `bitmap`, `granularity` | a bitmap that records writes |
//! | `bitmap-remove`, `bitmap-clear`, `bitmap-enable`, `bitmap-disable` | `bitmap` | |
//! | `bitmap-merge` | `bitmap`, `source` | |
//! | `bitmap-list` | | |
//! | `resize` | `size` | bytes, not less than before |
//!
//! # What to open after a crash
//!
//! `snapshot` and `commit` of the top change which file is the top. A server with a [`Record`] writes the
//! name of the new top into a small file before the new top is written to. `snapshot` works without one, and
//! its answer names the new top; `commit` of the top is refused.

mod command;
mod live;
mod metrics;
mod pause;
mod record;
mod serve;
mod socket;
mod top;

pub use command::{Action, Command, CommandError};
pub use live::{Controlled, ControlledOptions};
pub use pause::Pauses;
pub use record::Record;
pub use serve::{Seen, live, serve};
pub use socket::{Client, Control, Operator};
pub use top::top;
