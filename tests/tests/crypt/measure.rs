//! `measure` for encrypted images.

use super::both::Both;
use super::{FAST, OURS, in_qcow2, run};
use qcow2_testkit::oracle::Tool;
use std::fs;

const LUKS: &str = "create -q -f luks -o key-secret=s,iter-time=1 a.luks 1M";

#[test]
fn measure_output_matches_qemu_img() {
    let Some(both) = Both::new(&[LUKS]) else { return };
    let qcow2 = "measure -O qcow2 -o encrypt.format=luks,encrypt.key-secret";
    for rest in [
        "=s,encrypt.iter-time=1,cluster_size=512 --size 1000",
        "=s,encrypt.iter-time=1,cluster_size=100 --size 1M",
        "=s,encrypt.iter-time=1,preallocation=full --output json --size 1M",
        "=s,encrypt.iter-time=1,cluster_size=2M,encrypt.cipher-alg=aes-128 -o backing_file=x --size 1M",
        "=s,encrypt.iter-time=1 -f raw d.raw",
        "=zz --size 1M",
        "=s,encrypt.cipher-alg=foo --size 1M",
        "=s,encrypt.cipher-alg=cast5-128 --size 1M",
        "=s,encrypt.ivgen-alg=essiv,encrypt.ivgen-hash-alg=sha1 --size 1M",
    ] {
        both.line(&format!("{qcow2}{rest}"));
    }
    for line in [
        "measure -O qcow2 -o encrypt.format=luks --size 1M",
        "measure -O qcow2 -o encrypt.format=aes,encrypt.key-secret=zz --size 1M",
        "measure -O qcow2 -o encrypt.format=foo --size 1M",
        "measure -O luks -o key-secret=s,iter-time=1 --size 9223372036854775807",
        "measure -O luks -o key-secret=s,iter-time=1,cipher-alg=aes-128,size=5M,preallocation=foo --output json --size 1000",
        "measure -O luks -o key-secret=s,iter-time=1 -f raw d.raw",
        "measure -O luks --size 1M",
        "measure -O luks -o key-secret=zz --size 1M",
        "measure -O luks -o key-secret=s,cipher-alg=cast5-128 --size 1M",
        "measure -O raw a.luks",
        "measure -O raw --image-opts driver=luks,key-secret=s,file.filename=a.luks",
        "measure -O qcow2 --image-opts driver=luks,key-secret=w,file.filename=a.luks",
    ] {
        both.line(line);
    }
}

#[test]
fn the_measured_size_is_the_size_made() {
    let folder = super::world();
    let folder = folder.path();
    let ours = Tool::at(OURS);
    let required = |line: &str| -> u64 {
        let said = run(&ours, folder, line).expect_code(0).stdout;
        said.lines().next().unwrap().strip_prefix("required size: ").unwrap().parse().unwrap()
    };
    let options = format!("key-secret=s,{FAST}");
    for more in
        ["", ",cluster_size=4k", ",cluster_size=2M", ",encrypt.cipher-alg=aes-192,encrypt.cipher-mode=cbc"]
    {
        let options = format!("{}{more}", in_qcow2(&options));
        let measured = required(&format!("measure -O qcow2 -o {options} -f raw d.raw"));
        run(&ours, folder, &format!("convert -O qcow2 -o {options} -f raw -S 0 d.raw a.qcow2"))
            .expect_code(0);
        let made = fs::metadata(folder.join("a.qcow2")).unwrap().len();
        let cluster = if more.contains("2M") { 2 << 20 } else { 65536 };
        assert!(
            made <= measured && measured - made < 3 * cluster,
            "{more}: {measured} measured, {made} made"
        );
    }
    let measured = required(&format!("measure -O luks -o {options} -f raw d.raw"));
    run(&ours, folder, &format!("convert -O luks -o {options} -f raw d.raw a.luks")).expect_code(0);
    assert_eq!(fs::metadata(folder.join("a.luks")).unwrap().len(), measured);
}
