//! File systems by `virtiofsd`: the one in Rust, and the one in C of Debian's QEMU 7.2, which leaves the tag
//! to us. Needs a KVM that runs stock kernels: this host's, or the lab's.

// Functions beside the tests fail as tests do.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)]

use std::fs;
use std::path::Path;

use outboard_tests::backends::{Backend, SCRIPT, assert_worked, guest, program};
use outboard_tests::scratch::Scratch;
use outboard_tests::{need, place};

const FILES: usize = 1000;

/// Writes 1 000 small files and a large one, reads all back past the guest's cache, and reads what the host
/// wrote.
fn script() -> String {
    format!(
        r#"mount -t virtiofs work /mnt || exit 1
read -r word </mnt/from-host && [ "$word" = hello ] || exit 2
mkdir /mnt/many || exit 3
for n in $(seq {FILES}); do echo "file $n" >/mnt/many/$n || exit 4; done
dd if=/dev/urandom of=/tmp/large bs=64k count=32 2>/dev/null && cp /tmp/large /mnt/large || exit 5
umount /mnt && mount -t virtiofs work /mnt || exit 6
echo 3 >/proc/sys/vm/drop_caches
for n in $(seq {FILES}); do
    read -r line </mnt/many/$n && [ "$line" = "file $n" ] || {{ echo "$n: $line"; exit 7; }}
done
cmp /tmp/large /mnt/large || exit 8
set -- /mnt/many/*
echo files=$#
rm /mnt/many/1 && mv /mnt/many/2 /mnt/many/two && ln -s two /mnt/many/link && chmod 600 /mnt/many/3 || exit 9
umount /mnt
"#
    )
}

fn work(backend: &Backend, shared: &Path, options: &str) {
    let launch = need!(guest("virtiofs", &script()));
    let device = format!("fs,socket={}{options}", backend.socket().display());
    let ended = launch.arg("--vhost-user").arg(device).start().end(SCRIPT * 2);
    assert_worked(&ended);
    assert_eq!(ended.field("files"), FILES as u64);
    assert_eq!(fs::metadata(shared.join("large")).unwrap().len(), 2 << 20);
    let many = shared.join("many");
    assert!(!many.join("1").exists() && !many.join("2").exists());
    assert_eq!(fs::read_to_string(many.join("link")).unwrap(), "file 2\n");
    for n in 3..=FILES {
        assert_eq!(fs::read_to_string(many.join(n.to_string())).unwrap(), format!("file {n}\n"));
    }
}

fn shared_folder(scratch: &Scratch) -> String {
    let shared = scratch.path("shared");
    fs::create_dir(&shared).unwrap();
    fs::write(shared.join("from-host"), "hello\n").unwrap();
    shared.display().to_string()
}

#[test]
fn virtiofsd_in_rust_serves_a_thousand_files() {
    need!(place::kvm());
    let Some(virtiofsd) = program("virtiofsd") else { return };
    let scratch = Scratch::new();
    let shared = shared_folder(&scratch);
    let socket = format!("--socket-path={}", scratch.path("fs").display());
    let arguments = [socket, format!("--shared-dir={shared}"), "--tag=work".into(), "--sandbox=none".into()];
    let backend = Backend::start(&virtiofsd, scratch, "fs", &arguments);
    work(&backend, Path::new(&shared), "");
}

#[test]
fn virtiofsd_in_c_serves_a_thousand_files_by_the_tag_of_the_user() {
    need!(place::kvm());
    let Some(virtiofsd) = program("qemu-virtiofsd") else { return };
    let scratch = Scratch::new();
    let shared = shared_folder(&scratch);
    let arguments = [
        format!("--socket-path={}", scratch.path("fs").display()),
        "-o".into(),
        format!("source={shared},sandbox=chroot"),
    ];
    let backend = Backend::start(&virtiofsd, scratch, "fs", &arguments);
    work(&backend, Path::new(&shared), ",tag=work");
}
