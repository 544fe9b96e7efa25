//! What `measure` says, for people and as JSON.

use qcow2_ops::measure::Measure;
use serde_json::{Map, Value};

/// The sizes in bytes, one a line.
pub fn to_text(measured: &Measure) -> String {
    let mut text =
        format!("required size: {}\nfully allocated size: {}\n", measured.required, measured.fully_allocated);
    if let Some(bytes) = measured.bitmaps {
        text += &format!("bitmaps size: {bytes}\n");
    }
    text
}

/// The sizes as qemu-img's JSON object, keys in its order.
pub fn to_json(measured: &Measure) -> Value {
    let mut out = Map::new();
    if let Some(bytes) = measured.bitmaps {
        out.insert("bitmaps".to_owned(), bytes.into());
    }
    out.insert("required".to_owned(), measured.required.into());
    out.insert("fully-allocated".to_owned(), measured.fully_allocated.into());
    Value::Object(out)
}
