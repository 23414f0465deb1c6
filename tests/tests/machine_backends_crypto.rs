//! Ciphers by DPDK's vhost-crypto example on its openssl driver, whose sessions are opened on a control queue
//! that is ours. Needs a KVM that runs stock kernels: this host's, or the lab's; and Debian's generic kernel.

// Functions beside the tests fail as tests do.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)]

use std::fs;

use outboard_tests::backends::{Backend, SCRIPT, assert_worked, generic_guest, program};
use outboard_tests::scratch::Scratch;
use outboard_tests::{need, place};

fn aes(transport: &str) {
    need!(place::kvm());
    let (Some(example), Some(openssl), Some(ring)) =
        (program("dpdk-vhost-crypto"), program("dpdk-crypto-openssl"), program("dpdk-mempool-ring"))
    else {
        return;
    };
    let scratch = Scratch::new();
    // As for testpmd: two threads share the lab's one CPU.
    let text = format!(
        "--lcores 0@0,1@0 --no-huge -m 128 --no-pci --no-shconf --no-telemetry -d {} -d {} --vdev crypto_openssl0 -- \
         --socket-file 1,{} --config (1,0,0)",
        openssl.file_name().unwrap().to_str().unwrap(),
        ring.file_name().unwrap().to_str().unwrap(),
        scratch.path("crypto").display(),
    );
    let arguments: Vec<String> = text.split_whitespace().map(str::to_owned).collect();
    let backend = Backend::start(&example, scratch, "crypto", &arguments);
    let script = "grep -A1 'cbc(aes)' /proc/crypto | grep virtio_crypto_aes_cbc || exit 1\n\
                  guest cipher virtio_crypto_aes_cbc 50 || exit 2";
    let launch = need!(generic_guest("virtio_crypto,algif_skcipher", script));
    // It touches every page of the guest's memory before it answers SET_MEM_TABLE, beside a thread that never
    // rests.
    let device = format!("crypto,transport={transport},deadline=30000,socket={}", backend.socket().display());
    let ended = launch.arg("--vhost-user").arg(device).start().end(SCRIPT * 2);
    assert_worked(&ended);
    assert_eq!((ended.field("keys"), ended.field("pieces")), (3, 50), "{ended}");
    // A session for each key and direction, each closed in the end: as many answers as questions.
    let trace = fs::read_to_string(ended.files.path("trace")).unwrap();
    let count = |what: &str| trace.lines().filter(|line| line.contains(what)).count();
    assert!(count("> CREATE_CRYPTO_SESSION") >= 6, "{trace}");
    assert_eq!(count("> CREATE_CRYPTO_SESSION"), count("< CREATE_CRYPTO_SESSION"), "{trace}");
    assert_eq!(count("> CREATE_CRYPTO_SESSION"), count("> CLOSE_CRYPTO_SESSION"), "{trace}");
}

#[test]
fn dpdk_ciphers_for_the_stock_driver() {
    aes("mmio");
}

#[test]
fn dpdk_ciphers_for_the_stock_driver_on_pci() {
    aes("pci");
}
