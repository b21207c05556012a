"""Idle costs next to nothing: the whole agent has 0.03 s of CPU a minute (design 6)."""

from __future__ import annotations

import time

import trio


def test_a_minute_of_idle_probes_costs_little_cpu(bed):
    async def main():
        async with bed.node("a") as node:
            await node.primary()
            await node.until(lambda: node.observer.facts.is_primary)
            looks, began_s = 100, time.process_time()
            before = node.observer.facts.row_at
            for _ in range(looks):
                node.observer.kick()
                with trio.fail_after(2):
                    while node.observer.facts.row_at == before:
                        await trio.sleep(0.02)
                before = node.observer.facts.row_at
                await node.reader.read_facts(running=True)
            spent_s = (time.process_time() - began_s) / looks
            print(f"{spent_s * 1000:.2f} ms a look")
            assert spent_s * 6 < 0.03   # a look every 10 s
    trio.run(main)
