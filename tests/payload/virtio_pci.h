/* A virtio-pci device that looks like a virtio-mmio one; see virtio_pci.c. */
#pragma once

#include <stdint.h>

/* Finds the structures of a device on bus 0, and turns on memory, bus master and MSI-X. */
void pci_open(uint32_t number);
/* Registers of virtio-mmio by their offsets. */
uint32_t pci_reg(uint32_t offset);
void pci_set_reg(uint32_t offset, uint32_t value);
