//! Compresses one cluster of several kinds of content with both codecs: `cargo run -p qcow2-codec --example
//! cluster`.
#![allow(clippy::print_stdout, reason = "the example prints its results")]

use qcow2_codec::{Deflate, Zstd};
use qcow2_core::{ClusterCodec, CodecError};

const CLUSTER_SIZE: usize = 64 << 10;

fn main() -> Result<(), CodecError> {
    let text: Vec<u8> = "A cluster that repeats one sentence. ".bytes().cycle().take(CLUSTER_SIZE).collect();
    let numbers: Vec<u8> = (0..CLUSTER_SIZE / 4).flat_map(|n| (n as u32 * 7).to_be_bytes()).collect();
    let mut state = 1u64;
    let mut noise = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        (state >> 56) as u8
    };
    let noise: Vec<u8> = (0..CLUSTER_SIZE).map(|_| noise()).collect();
    let codecs: [(&str, Box<dyn ClusterCodec>); 2] =
        [("deflate", Box::new(Deflate::default())), ("zstd", Box::new(Zstd::default()))];
    for (method, codec) in &codecs {
        for (content, cluster) in [("text", &text), ("numbers", &numbers), ("noise", &noise)] {
            show(method, content, &**codec, cluster)?;
        }
    }
    Ok(())
}

/// The output buffer is one byte shorter than the cluster: a stream must be shorter to be worth storing.
fn show(method: &str, content: &str, codec: &dyn ClusterCodec, cluster: &[u8]) -> Result<(), CodecError> {
    let mut stream = vec![0; cluster.len() - 1];
    let Some(len) = codec.compress(cluster, &mut stream)? else {
        println!("{method}: {content} does not compress and is stored uncompressed");
        return Ok(());
    };
    let mut back = vec![0; cluster.len()];
    codec.expand(&stream[..len], &mut back)?;
    let same = if back == cluster { "round trip ok" } else { "ROUND TRIP FAILED" };
    println!("{method}: {content} compresses to {len} of {} bytes, {same}", cluster.len());
    Ok(())
}
