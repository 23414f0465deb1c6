//! Guest memory in huge pages, where it cannot be reached by reads and writes of a file: the control queues
//! that the VMM serves itself, and a recovery that writes the available ring anew. Needs KVM's interface, and
//! a host that lets 16 huge pages be reserved.

// Functions beside the tests fail as tests do.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)]

use std::fs;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use outboard_tests::daemon::StorageDaemon;
use outboard_tests::launch::{Ended, Launch, STEP, first_device};
use outboard_tests::payload::{Answers, CommandLine};
use outboard_tests::place::Missing;
use outboard_tests::scratch::Scratch;
use outboard_tests::{need, place};
use transport::testing::{Offer, Script, ScriptedBackend};
use transport::vhost_user::ProtocolFeatures;

/// Memory of each machine: 16 pages of 2 MiB.
const MEMORY: &str = "32M,hugepages=2M";
const PAGES: u32 = 16;

/// Huge pages that were reserved for one machine at a time. What was reserved before is put back.
struct Reserved {
    before: u32,
    _one: MutexGuard<'static, ()>,
}

const FOLDER: &str = "/sys/kernel/mm/hugepages/hugepages-2048kB";

impl Reserved {
    fn new() -> Result<Self, Missing> {
        static ONE: Mutex<()> = Mutex::new(());
        place::kvm()?;
        let one = ONE.lock().unwrap_or_else(PoisonError::into_inner);
        let number = |name: &str| -> Option<u32> {
            fs::read_to_string(format!("{FOLDER}/{name}")).ok()?.trim().parse().ok()
        };
        let missing = |why: &str| Missing::optional(format!("no huge pages here: {why}"));
        let before = number("nr_hugepages").ok_or_else(|| missing("this kernel has none"))?;
        let free = number("free_hugepages").unwrap_or(0);
        let wanted = before + PAGES.saturating_sub(free);
        fs::write(format!("{FOLDER}/nr_hugepages"), wanted.to_string())
            .map_err(|error| missing(&format!("they cannot be reserved ({error})")))?;
        let reserved = Self { before, _one: one };
        if number("free_hugepages") < Some(PAGES) {
            return Err(missing("the host's memory is in too small pieces"));
        }
        Ok(reserved)
    }
}

impl Drop for Reserved {
    fn drop(&mut self) {
        if let Err(error) = fs::write(format!("{FOLDER}/nr_hugepages"), self.before.to_string()) {
            eprintln!("the huge pages stay reserved: {error}");
        }
    }
}

/// Asks the control queue of a device, which the VMM serves, and gives the answers.
fn asked(device: &str, offer: Offer, line: &CommandLine) -> (Ended, Vec<Vec<u8>>) {
    let scratch = Scratch::new();
    let socket = scratch.path("scripted");
    let backend = ScriptedBackend::listen(&socket, offer, Script::normal()).unwrap();
    let device = format!("{device},socket={}", socket.display());
    let launch = Launch::payload(line).args(["--memory", MEMORY, "--vhost-user", &device]);
    let ended = launch.run().with_code(0);
    assert_eq!(backend.breaches(), Vec::<String>::new(), "{ended}");
    assert_eq!(ended.stats().text("/devices/0/state"), "idle", "{ended}");
    let answers = Answers::of(&ended.console);
    assert_eq!(answers.complaint(), None, "{ended}");
    let asked = answers.asked();
    (ended, asked)
}

#[test]
fn a_network_card_is_told_how_many_pairs_of_queues_to_use() {
    let _reserved = need!(Reserved::new());
    // VIRTIO_NET_F_CTRL_VQ and VIRTIO_NET_F_MQ; a configuration of two pairs (virtio 1.2 §5.1.4).
    const FEATURES: u32 = 1 << 17 | 1 << 22;
    let mut config = vec![0; 60];
    config[8] = 2;
    let usual = Offer::default();
    let features = usual.features | u64::from(FEATURES);
    let offer = Offer { features, queue_num: 4, config, ..usual };
    let line = first_device("ask").arg("queues", 5).arg("accept", FEATURES).arg("answer", 1);
    // VIRTIO_NET_CTRL_MQ_VQ_PAIRS_SET of 2, of 1, and of more than there are (§5.1.6.5.5).
    let line = line.arg("request", "4:04000200").arg("request", "4:04000100").arg("request", "4:04000900");
    let (ended, answers) = asked("net,queues=4", offer, &line);
    assert_eq!(answers, [[0], [0], [1]], "VIRTIO_NET_OK twice, VIRTIO_NET_ERR\n{ended}");
}

#[test]
fn a_cipher_device_answers_on_its_control_queue() {
    let _reserved = need!(Reserved::new());
    let usual = Offer::default();
    let protocol = usual.protocol.with(ProtocolFeatures::CRYPTO_SESSION);
    // One data queue, ready, all services (virtio 1.2 §5.9.4).
    let mut config = vec![0; 56];
    (config[0], config[4], config[8]) = (1, 1, 1);
    let offer = Offer { protocol, queue_num: 1, config, ..usual };
    // VIRTIO_CRYPTO_CIPHER_DESTROY_SESSION of a session that was never opened (§5.9.7.2).
    let mut request = [0_u8; 72];
    (request[0], request[16]) = (3, 77);
    let hex: String = request.iter().map(|byte| format!("{byte:02x}")).collect();
    let line = first_device("ask").arg("queues", 2).arg("answer", 1).arg("request", format!("1:{hex}"));
    let (ended, answers) = asked("crypto", offer, &line);
    assert_eq!(answers.len(), 1, "{ended}");
    assert_ne!(answers[0], [0], "no session has this number\n{ended}");
}

#[test]
fn a_recovery_that_writes_the_available_ring_anew_loses_nothing() {
    let _reserved = need!(Reserved::new());
    let mut disk = need!(StorageDaemon::start(4 << 20));
    let line = first_device("deep").arg("n", 2_000_000_000).arg("depth", 16).arg("timeout", 100);
    let launch = Launch::payload(&line).args(["--memory", MEMORY]).disk_with(&disk.socket(), "reconnect=30");
    let mut vm = launch.start();
    vm.expect("running");
    let kills = if place::soak() { 100 } else { 5 };
    for killed in 1..=kills {
        std::thread::sleep(Duration::from_millis(20 + 37 * killed % 180));
        let starts = vm.starts(&disk.socket());
        disk.kill();
        disk.restart();
        vm.expect_starts(&disk.socket(), starts + 1);
    }
    vm.send(b"q");
    let ended = vm.end(3 * STEP).with_code(0);
    assert!(ended.console.contains(" well\n"), "{ended}");
    assert_eq!((ended.field("errors"), ended.stats().number("/devices/0/recoveries")), (0, kills), "{ended}");
}
