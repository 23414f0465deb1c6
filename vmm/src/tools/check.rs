//! `outboard check`: reports which guests this host can boot.

use std::process::ExitCode;

use kvm_ioctls::{Cap, Kvm};
use serde::Serialize;

use super::guest_mode::{Bench, PROBES, Verdict};
use crate::error::{Error, Fault};
use crate::host::kvm;

/// The result of the check.
#[derive(Clone, Debug, Serialize)]
pub struct Report {
    /// Machines with small payloads run: this covers every test that needs only KVM's interface.
    pub runs_payloads: bool,
    /// Unmodified distribution kernels boot.
    pub runs_stock_kernels: bool,
    /// The capabilities that outboard uses.
    pub capabilities: Vec<Capability>,
    /// Instructions of stock kernels that this KVM does not execute in guest mode.
    pub failing_instructions: Vec<Instruction>,
    /// How many instructions were tried.
    pub tried_instructions: usize,
}

/// One capability of KVM.
#[derive(Clone, Debug, Serialize)]
pub struct Capability {
    /// What it is.
    pub name: &'static str,
    /// The value that KVM reports; 0 is absence.
    pub value: i32,
    /// The feature that is missing without the capability.
    pub without: &'static str,
}

/// One instruction that failed.
#[derive(Clone, Debug, Serialize)]
pub struct Instruction {
    /// The mnemonic.
    pub name: &'static str,
    /// The message of KVM.
    pub why: String,
}

/// Capabilities that only some features need. [`kvm::open`] checks the capabilities that every machine needs.
const OPTIONAL: [(Cap, &str, &str); 6] = [
    (Cap::NrMemslots, "memory slots", "devices with memory of their own"),
    (Cap::IrqRouting, "interrupt routes", "message-signalled interrupts"),
    (Cap::IrqfdResample, "level interrupts by irqfd", "PCI INTx without exits"),
    (Cap::MaxVcpus, "vCPUs", "machines with many vCPUs"),
    (Cap::TscDeadlineTimer, "TSC deadline timer", "cheap guest timers"),
    (Cap::SplitIrqchip, "split interrupt controller", "nothing that outboard needs"),
];

/// Examines this host.
///
/// # Errors
/// When it has no KVM that outboard can use at all.
pub fn examine() -> Result<Report, Error> {
    let kvm = kvm::open()?;
    let capabilities = OPTIONAL
        .into_iter()
        .map(|(cap, name, without)| Capability { name, value: kvm.check_extension_int(cap), without })
        .collect();
    let failing = failing_instructions(&kvm)?;
    Ok(Report {
        runs_payloads: true,
        runs_stock_kernels: failing.is_empty(),
        capabilities,
        failing_instructions: failing,
        tried_instructions: PROBES.len(),
    })
}

fn failing_instructions(kvm: &Kvm) -> Result<Vec<Instruction>, Error> {
    let mut failing = Vec::new();
    for probe in PROBES {
        // Each probe has a VM of its own, so that the state a failing probe leaves behind cannot make the
        // next one fail.
        if let Verdict::Fails(why) = Bench::new(kvm)?.run(probe) {
            failing.push(Instruction { name: probe.name, why });
        }
    }
    Ok(failing)
}

/// Runs `outboard check [--json]`. The exit code is 0 when stock kernels boot, otherwise the code of
/// [`Fault::Host`].
///
/// # Errors
/// When there is no usable KVM, or standard output is closed.
pub fn command(json: bool) -> Result<ExitCode, Error> {
    let report = examine()?;
    super::print(&report, if json { None } else { Some(describe(&report)) })?;
    let fit = report.runs_stock_kernels;
    Ok(ExitCode::from(if fit { 0 } else { Fault::Host.exit_code() }))
}

fn describe(report: &Report) -> String {
    use std::fmt::Write;
    let mut text = String::new();
    let mut line = |words: std::fmt::Arguments<'_>| {
        // Writing to a String cannot fail.
        text.write_fmt(words).unwrap_or_default();
        text.push('\n');
    };
    line(format_args!("/dev/kvm: usable (in-kernel interrupts, ioeventfd, irqfd, read-only slots)"));
    for capability in &report.capabilities {
        match capability.value {
            0 => line(format_args!("  no {}: {} will not work", capability.name, capability.without)),
            value => line(format_args!("  {}: {value}", capability.name)),
        }
    }
    line(format_args!(
        "guest mode: {} of {} instructions of stock kernels work",
        report.tried_instructions.saturating_sub(report.failing_instructions.len()),
        report.tried_instructions
    ));
    for instruction in &report.failing_instructions {
        line(format_args!("  {} does not: {}", instruction.name, instruction.why));
    }
    line(format_args!("this host runs payloads of your own (tiny kernels): yes"));
    if report.runs_stock_kernels {
        line(format_args!("this host boots stock Linux kernels: yes"));
    } else {
        line(format_args!(
            "this host boots stock Linux kernels: no, its KVM emulates guest code and lacks the instructions above"
        ));
    }
    text
}
