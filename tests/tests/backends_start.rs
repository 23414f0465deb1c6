//! Backends that others wrote for devices that no stock guest of ours has a driver for, or needs one: the
//! tiny kernel asks each of them something. On any host with KVM.

// Functions beside the tests fail as tests do.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)]

use std::fs;
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::time::Duration;

use outboard_tests::backends::{Backend, optional_program, program};
use outboard_tests::display::{HEIGHT, WIDTH, display};
use outboard_tests::launch::{Ended, Launch, first_device};
use outboard_tests::scratch::Scratch;
use outboard_tests::{need, place};

const LIMIT: Duration = Duration::from_secs(30);

/// Words of a message as the tiny kernel takes it.
fn hex(words: &[u32]) -> String {
    words.iter().flat_map(|word| word.to_le_bytes()).map(|byte| format!("{byte:02x}")).collect()
}

/// Asks a queue of a device, the tiny kernel having set up this many; every acknowledgement must have said
/// yes.
fn ask(device: &str, backend: &Backend, queues: u32, request: &[u32], answer: usize) -> Ended {
    ask_all(device, backend, queues, &[hex(request)], answer)
}

/// The same of several requests, in hexadecimal.
fn ask_all(device: &str, backend: &Backend, queues: u32, requests: &[String], answer: usize) -> Ended {
    let line = first_device("ask").arg("queues", queues).arg("answer", answer);
    let line = requests.iter().fold(line, |line, request| line.arg("request", request));
    let device = format!("{device},socket={}", backend.socket().display());
    let ended = Launch::payload(&line).arg("--vhost-user").arg(device).start().end(LIMIT);
    assert_eq!(ended.code, Some(0), "{ended}");
    let count = u64::try_from(requests.len()).unwrap();
    assert_eq!((ended.field("requests"), ended.field("errors")), (count, 0), "{ended}");
    assert_eq!(ended.stats().number("/devices/0/requests_through_vmm"), 0, "{ended}");
    let trace = fs::read_to_string(ended.files.path("trace")).unwrap();
    let asked = trace.lines().filter(|line| line.contains(" > ") && line.contains("need_reply")).count();
    let agreed = trace.lines().filter(|line| line.contains("value=0x0 ")).count();
    assert!(
        asked > 8 && asked == agreed,
        "{asked} acknowledgements were asked for, {agreed} were given\n{trace}"
    );
    ended
}

/// What was answered to each request.
fn answers(ended: &Ended) -> Vec<&str> {
    ended
        .console
        .lines()
        .filter_map(|line| line.split_once("answer "))
        .map(|(_, answer)| answer.trim())
        .collect()
}

#[test]
fn vhost_device_sound_tells_of_its_streams() {
    need!(place::kvm());
    let Some(sound) = program("vhost-device-sound") else { return };
    let scratch = Scratch::new();
    let arguments = [format!("--socket={}", scratch.path("sound").display()), "--backend=null".into()];
    let backend = Backend::start(&sound, scratch, "sound", &arguments);
    // VIRTIO_SND_R_PCM_INFO from 0, 2 of 32 bytes: a status and as many structs (virtio 1.2 §5.14.6.6.2).
    let ended = ask("sound", &backend, 4, &[0x100, 0, 2, 32], 68);
    assert_eq!((ended.field("device"), ended.field("used-length")), (25, 68), "{ended}");
    assert!(ended.console.contains("answer 00800000"), "VIRTIO_SND_S_OK\n{ended}");
}

#[test]
fn vhost_device_scmi_tells_the_version_of_its_base_protocol() {
    need!(place::kvm());
    let Some(scmi) = program("vhost-device-scmi") else { return };
    let scratch = Scratch::new();
    let arguments = [format!("--socket-path={}", scratch.path("scmi").display())];
    let backend = Backend::start(&scmi, scratch, "scmi", &arguments);
    // PROTOCOL_VERSION (0) of protocol 0x10, token 5: the header, SUCCESS and 2.0 (SCMI 3.2 §4.2.2.2).
    let header = 0x10 << 10 | 5 << 18;
    let ended = ask("scmi", &backend, 2, &[header], 12);
    assert_eq!((ended.field("device"), ended.field("used-length")), (32, 12), "{ended}");
    assert!(ended.console.contains(&format!("answer {}", hex(&[header, 0, 0x20000]))), "{ended}");
}

/// Kernels of today have neither a driver for the guest nor an SPI device for the host: the backend drives a
/// stand-in.
#[test]
fn vhost_device_spi_transfers_bytes_and_refuses_what_its_device_cannot() {
    need!(place::kvm());
    let Some(spi) = program("vhost-device-spi") else { return };
    let scratch = Scratch::new();
    let stand_in = scratch.file("spi.so", include_bytes!(concat!(env!("OUT_DIR"), "/spi.so")));
    let arguments = [
        format!("LD_PRELOAD={}", stand_in.display()),
        spi.display().to_string(),
        format!("--socket-path={}", scratch.path("spi").display()),
        format!("--device={}", scratch.file("spidev", b"").display()),
    ];
    // It numbers its sockets.
    let backend = Backend::start(Path::new("/usr/bin/env"), scratch, "spi0", &arguments);
    // It dies of a question for more than its own configuration, which is all that a probe that knows its
    // type asks for.
    let probe = ["probe", "vhost-user", backend.socket().to_str().unwrap(), "--type", "spi"];
    let offer = Launch::new(probe).run().with_code(0);
    // One chip, its line may change; words of 8 bits; every phase and polarity, and the loop; 1 MHz.
    assert!(offer.console.contains(&hex(&[0x0101, 0x80, 0x4f, 1_000_000])), "{offer}");
    // Chip 0 and the bits of a word, then a line each way, no mode, the frequency, and no delays (struct
    // virtio_spi_transfer_head).
    let transfer = |bits: u32, hertz| hex(&[1 << 24 | bits << 8, 1, 0, hertz, 0, 0, 0, 0]) + "deadbeef";
    let requests = [transfer(8, 1_000_000), transfer(7, 1_000_000), transfer(8, 2_000_000), transfer(8, 0)];
    let ended = ask_all("spi", &backend, 1, &requests, 5);
    assert_eq!((ended.field("device"), ended.field("used-length")), (45, 5), "{ended}");
    let answers: Vec<_> = answers(&ended).into_iter().map(|answer| answer.split_at(8)).collect();
    let statuses: Vec<_> = answers.iter().map(|(_, status)| *status).collect();
    assert_eq!(statuses, ["00", "01", "01", "00"], "OK, and VIRTIO_SPI_PARAM_ERR\n{ended}");
    assert_eq!(
        (answers[0].0, answers[3].0),
        ("21524110", "21524110"),
        "what the device makes of it\n{ended}"
    );
}

/// No stock kernel has a driver that would read its frames.
#[test]
fn vhost_device_media_shows_its_buffers_in_shared_memory() {
    need!(place::kvm());
    let Some(media) = optional_program("vhost-device-media") else { return };
    let scratch = Scratch::new();
    let socket = format!("--socket-path={}", scratch.path("media").display());
    let backend = Backend::start(&media, scratch, "media", &[socket, "--backend=simple-capture".into()]);
    // CMD_OPEN; VIDIOC_REQBUFS of session 0: two buffers of its multi-planar queue (9), by MMAP (1); CMD_MMAP
    // for reading and writing of both, which it calls 0 and 0x1000; CMD_MUNMAP of the first; CMD_MMAP again,
    // for reading.
    let map = |name, flags| hex(&[4, 0, 0, flags, name]);
    let begin = [hex(&[1, 0]), hex(&[3, 0, 0, 8, 2, 9, 1, 0, 0])];
    let maps = [map(0, 1), map(0x1000, 1), hex(&[5, 0, 0, 0]), map(0, 0)];
    let ended = ask_all("media", &backend, 2, &[&begin[..], &maps].concat(), 28);
    assert_eq!((ended.field("device"), ended.field("used-length")), (48, 24), "{ended}");
    // A frame of 640 by 480 ends within a page, behind which the next one begins.
    let frame = 640 * 480 * 3 / 2;
    let at = |place| hex(&[0, 0, place, 0, frame, 0]);
    let (first, second) = (at(0), at(frame.next_multiple_of(0x1000)));
    let answers = answers(&ended);
    for (n, expected) in [(2, &first), (3, &second), (4, &hex(&[0])), (5, &first)] {
        assert!(answers[n].starts_with(expected), "answer {n} is not {expected}\n{ended}");
    }
    let trace = fs::read_to_string(ended.files.path("trace")).unwrap();
    let agreed =
        |what: &str| trace.lines().filter(|line| line.contains(what) && line.contains("code=0x0")).count();
    assert_eq!((agreed(">> SHMEM_MAP"), agreed(">> SHMEM_UNMAP")), (3, 1), "{trace}");
}

#[test]
fn virtiofsd_hears_of_the_guests_reset() {
    need!(place::kvm());
    let Some(virtiofsd) = program("virtiofsd") else { return };
    let scratch = Scratch::new();
    let socket = format!("--socket-path={}", scratch.path("fs").display());
    let shared = format!("--shared-dir={}", scratch.path("").display());
    let arguments = [socket, shared, "--tag=work".into(), "--sandbox=none".into()];
    let backend = Backend::start(&virtiofsd, scratch, "fs", &arguments);
    // FUSE_INIT, version 7.38: a header of 40 bytes and a body of 64; the answer has 16 and 64.
    let mut request = [0; 26];
    (request[0], request[1], request[2]) = (104, 26, 1);
    (request[10], request[11]) = (7, 38);
    let ended = ask("fs", &backend, 2, &request, 80);
    assert_eq!((ended.field("device"), ended.field("used-length")), (26, 80), "{ended}");
    let trace = fs::read_to_string(ended.files.path("trace")).unwrap();
    let reset = trace.lines().filter(|line| line.contains("RESET_DEVICE")).count();
    assert_eq!(reset, 2, "a request and its acknowledgement\n{trace}");
}

#[test]
fn qemu_gpu_asks_the_display_that_it_was_given_for_its_size() {
    need!(place::kvm());
    let Some(gpu) = program("vhost-user-gpu") else { return };
    let scratch = Scratch::new();
    let seen = scratch.path("display");
    let _screen = display(UnixListener::bind(&seen).unwrap());
    let arguments = [format!("--socket-path={}", scratch.path("gpu").display())];
    let backend = Backend::start(&gpu, scratch, "gpu", &arguments);
    // VIRTIO_GPU_CMD_GET_DISPLAY_INFO; the answer is the display's (virtio 1.2 §5.7.6.8).
    let device = format!("gpu,gpu-socket={}", seen.display());
    let ended = ask(&device, &backend, 2, &[0x100, 0, 0, 0, 0, 0], 408);
    let [width, height] = [WIDTH, HEIGHT].map(|side| u32::try_from(side).unwrap());
    assert!(ended.console.contains(&hex(&[0x1101, 0, 0, 0, 0, 0, 0, 0, width, height, 1])), "{ended}");
}
