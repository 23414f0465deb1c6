//! Compiles the bare-metal guest of `tests/payload/` into `OUT_DIR/tiny-kernel.elf`. Needs gcc and binutils,
//! nothing else.

use std::env;
use std::error::Error;
use std::path::{Path, PathBuf};
use std::process::Command;

/// 32-bit code in an ELF64 object. The code is of the plainest kind (`-march=i386`, no SSE), because some
/// KVMs emulate guest code instruction by instruction; and it needs no C library.
const FLAGS: &[&str] = &[
    "-m32",
    "-Wa,--64",
    "-march=i386",
    "-Os",
    "-std=gnu11",
    "-ffreestanding",
    "-fno-pic",
    "-fomit-frame-pointer",
    "-fno-stack-protector",
    "-fno-asynchronous-unwind-tables",
    "-fno-toplevel-reorder",
    "-fno-tree-loop-distribute-patterns",
    "-fcf-protection=none",
    "-mgeneral-regs-only",
    "-Wall",
    "-Wextra",
    // Registers are addresses that gcc takes for objects of size 0.
    "-Wno-array-bounds",
    "-nostdlib",
    "-static",
    "-no-pie",
    "-s",
    "-Wl,-m,elf_x86_64,-n,--build-id=none,--no-warn-rwx-segments",
];

const SOURCES: &[&str] = &[
    "start.S",
    "payload.c",
    "machine.c",
    "interrupts.c",
    "virtio.c",
    "virtio_pci.c",
    "modes.c",
    "abuse.c",
    "deep.c",
    "pci.c",
];

fn main() -> Result<(), Box<dyn Error>> {
    let source = Path::new("../payload");
    let output = PathBuf::from(env::var_os("OUT_DIR").ok_or("cargo sets OUT_DIR")?).join("tiny-kernel.elf");
    println!("cargo::rerun-if-changed=../payload");
    println!("cargo::rerun-if-env-changed=CC");

    let compiler = env::var_os("CC").unwrap_or_else(|| "gcc".into());
    let status = Command::new(&compiler)
        .args(FLAGS)
        .arg("-include")
        .arg(source.join("code32.h"))
        .arg("-T")
        .arg(source.join("payload.ld"))
        .args(SOURCES.iter().map(|file| source.join(file)))
        .arg("-o")
        .arg(&output)
        .status()
        .map_err(|error| format!("cannot run {} for the tiny kernel: {error}", compiler.to_string_lossy()))?;
    if !status.success() {
        return Err(
            format!("{} could not build the tiny kernel: {status}", compiler.to_string_lossy()).into()
        );
    }
    Ok(())
}
