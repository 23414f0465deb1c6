//! Frames by DPDK's `dpdk-testpmd` with `net_vhost`, which forwards nothing before STATUS says DRIVER_OK.
//! Needs a KVM that runs stock kernels: this host's, or the lab's.

// Functions beside the tests fail as tests do.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)]

use std::fs;
use std::path::Path;

use outboard_tests::backends::{Backend, SCRIPT, assert_worked, guest, program};
use outboard_tests::scratch::Scratch;
use outboard_tests::{need, place};

const FRAMES: u64 = 500;

fn file_name(path: &Path) -> &str {
    path.file_name().unwrap().to_str().unwrap()
}

/// What the guest sends comes back to it, one at a time.
fn loop_back(role: &str, iommu: &str) {
    need!(place::kvm());
    let (Some(testpmd), Some(vhost), Some(ring)) =
        (program("dpdk-testpmd"), program("dpdk-net-vhost"), program("dpdk-mempool-ring"))
    else {
        return;
    };
    let scratch = Scratch::new();
    let client = u8::from(role == "server");
    // Two threads share the lab's one CPU; memory without huge pages; no PCI devices, no files of DPDK's own.
    let text = format!(
        "--lcores 0@0,1@0 --no-huge -m 128 --no-pci --no-shconf --no-telemetry -d {} -d {} --vdev net_vhost0,iface={},queues=1,client={client},iommu-support={} -- \
         --forward-mode=io --port-topology=loop --total-num-mbufs=4096 --no-mlockall --disable-link-check --auto-start",
        file_name(&vhost),
        file_name(&ring),
        scratch.path("net").display(),
        u8::from(iommu != "off"),
    );
    let arguments: Vec<String> = text.split_whitespace().map(str::to_owned).collect();
    let script = format!(
        "ip link set eth0 up && guest frames eth0 {FRAMES} || exit 1\n\
         cd /sys/class/net/eth0/statistics && echo mtu=$(cat ../mtu) sent=$(cat tx_packets) received=$(cat rx_packets)"
    );
    let launch = need!(guest("virtio_net", &script));
    let device = format!(
        "net,socket={},server={},iommu={iommu},mtu=1400,deadline=30000",
        scratch.path("net").display(),
        if client == 1 { "on" } else { "off" }
    );
    let launch = launch.arg("--vhost-user").arg(device);
    let ended = if client == 1 {
        let _backend = Backend::start_only(&testpmd, scratch, "net", &arguments);
        launch.start().end(SCRIPT * 2)
    } else {
        let _backend = Backend::start(&testpmd, scratch, "net", &arguments);
        launch.start().end(SCRIPT * 2)
    };
    assert_worked(&ended);
    let translated = std::fs::read_to_string(ended.files.path("trace")).unwrap().contains("IOTLB_MSG");
    assert_eq!(translated, iommu != "off", "{ended}");
    assert_eq!((ended.field("frames"), ended.field("mtu")), (FRAMES, 1400), "{ended}");
    assert!(ended.field("sent") >= FRAMES && ended.field("received") >= FRAMES, "{ended}");
    // DRIVER_OK was told to the backend, and the backend says so.
    let trace = fs::read_to_string(ended.files.path("trace")).unwrap();
    let of = |name: &str| trace.lines().filter(|line| line.contains(name)).collect::<Vec<_>>();
    assert!(of("SET_STATUS").iter().any(|line| line.contains("0xf")), "{trace}");
    assert!(of("< GET_STATUS").iter().any(|line| line.contains("0xf")), "{trace}");
}

#[test]
fn dpdk_loops_frames_back_when_we_connect_to_it() {
    loop_back("client", "off");
}

#[test]
fn dpdk_loops_frames_back_when_it_connects_to_us() {
    loop_back("server", "off");
}

#[test]
fn dpdk_loops_frames_back_behind_an_iommu() {
    loop_back("client", "identity");
}
