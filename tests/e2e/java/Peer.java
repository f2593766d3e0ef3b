import java.nio.charset.StandardCharsets;
import java.util.ArrayList;
import java.util.Base64;
import java.util.Collections;
import java.util.List;
import java.util.Map;
import java.util.TreeMap;
import java.util.concurrent.locks.LockSupport;
import org.apache.rocketmq.client.consumer.DefaultMQPushConsumer;
import org.apache.rocketmq.client.consumer.listener.ConsumeConcurrentlyStatus;
import org.apache.rocketmq.client.consumer.listener.MessageListenerConcurrently;
import org.apache.rocketmq.client.consumer.rebalance.AllocateMessageQueueAveragely;
import org.apache.rocketmq.client.producer.DefaultMQProducer;
import org.apache.rocketmq.client.producer.SendResult;
import org.apache.rocketmq.common.consumer.ConsumeFromWhere;
import org.apache.rocketmq.common.message.Message;
import org.apache.rocketmq.common.message.MessageExt;
import org.apache.rocketmq.common.message.MessageQueue;

/**
 * The official Java client as the other end of a test. One JSON object a line on standard output; ends when standard
 * input does.
 *
 * <pre>
 * Peer produce  NAMESRV TOPIC TAG COUNT BODY_BYTES COMPRESSION [NAME=VALUE ...]
 * Peer consume  NAMESRV GROUP TOPIC EXPRESSION [send-back]
 * Peer allocate CLIENT_ID QUEUES MEMBER ...        (no RocketMQ needed; one line of queue ids)
 * </pre>
 */
public class Peer {
    public static void main(String[] args) {
        try {
            switch (args[0]) {
                case "produce" -> produce(args);
                case "consume" -> consume(args);
                case "allocate" -> allocate(args);
                default -> throw new IllegalArgumentException(args[0]);
            }
        } catch (Exception e) {
            e.printStackTrace();
            // The client's threads would keep the process alive.
            System.exit(1);
        }
        System.exit(0);
    }

    private static void produce(String[] args) throws Exception {
        String topic = args[2];
        int count = Integer.parseInt(args[4]);
        int size = Integer.parseInt(args[5]);
        // Read once, when the producer's class is made.
        System.setProperty("rocketmq.message.compressType", args[6]);
        DefaultMQProducer producer = new DefaultMQProducer("java_peer_producer");
        producer.setNamesrvAddr(args[1]);
        producer.setVipChannelEnabled(false);
        // 3 s each by default, which a small machine under load exceeds.
        producer.setSendMsgTimeout(30_000);
        producer.setMqClientApiTimeout(30_000);
        producer.start();
        for (int i = 0; i < count; i++) {
            StringBuilder body = new StringBuilder("java-" + i + "-");
            while (body.length() < size) {
                body.append((char) ('a' + body.length() % 26));
            }
            Message message = new Message(topic, args[3], "key" + i, body.toString().getBytes(StandardCharsets.UTF_8));
            for (int p = 7; p < args.length; p++) {
                int at = args[p].indexOf('=');
                message.putUserProperty(args[p].substring(0, at), args[p].substring(at + 1));
            }
            SendResult result = producer.send(message);
            Map<String, String> line = new TreeMap<>();
            line.put("msgId", result.getMsgId());
            line.put("status", result.getSendStatus().name());
            line.put("queueId", Integer.toString(result.getMessageQueue().getQueueId()));
            print(line);
        }
        producer.shutdown();
    }

    private static void consume(String[] args) throws Exception {
        String topic = args[3];
        boolean sendBack = args.length > 5 && args[5].equals("send-back");
        DefaultMQPushConsumer consumer = new DefaultMQPushConsumer(args[2]);
        consumer.setNamesrvAddr(args[1]);
        consumer.setInstanceName("peer" + ProcessHandle.current().pid());
        consumer.setVipChannelEnabled(false);
        consumer.setMqClientApiTimeout(30_000);
        consumer.setConsumeFromWhere(ConsumeFromWhere.CONSUME_FROM_FIRST_OFFSET);
        consumer.setPersistConsumerOffsetInterval(1000);
        consumer.subscribe(topic, args[4]);
        consumer.registerMessageListener((MessageListenerConcurrently) (messages, context) -> {
            for (MessageExt message : messages) {
                printMessage(message);
            }
            if (sendBack) {
                context.setDelayLevelWhenNextConsume(1);
                return ConsumeConcurrentlyStatus.RECONSUME_LATER;
            }
            return ConsumeConcurrentlyStatus.CONSUME_SUCCESS;
        });
        consumer.start();
        Map<String, String> line = new TreeMap<>();
        line.put("started", consumer.getDefaultMQPushConsumerImpl().getmQClientFactory().getClientId());
        print(line);
        watchQueues(consumer, topic);
        while (System.in.read() >= 0) {
            // Until the test closes our standard input.
        }
        consumer.shutdown();
    }

    private static void allocate(String[] args) {
        List<MessageQueue> queues = new ArrayList<>();
        for (int i = 0; i < Integer.parseInt(args[2]); i++) {
            queues.add(new MessageQueue("topic", i % 2 == 0 ? "broker-b" : "broker-a", i / 2));
        }
        List<String> members = new ArrayList<>(List.of(args).subList(3, args.length));
        Collections.sort(queues);
        Collections.sort(members);
        Map<String, String> line = new TreeMap<>();
        line.put("members", String.join(",", members));
        List<String> mine = new ArrayList<>();
        for (MessageQueue queue : new AllocateMessageQueueAveragely().allocate("group", args[1], queues, members)) {
            mine.add(queue.getBrokerName() + ":" + queue.getQueueId());
        }
        line.put("queues", String.join(",", mine));
        line.put("hash", Integer.toString(args[1].hashCode()));
        print(line);
    }

    /** Prints the queues of the topic whenever others are ours; 4.9 has no listener for that. */
    private static void watchQueues(DefaultMQPushConsumer consumer, String topic) {
        Map<MessageQueue, ?> table = consumer.getDefaultMQPushConsumerImpl().getRebalanceImpl().getProcessQueueTable();
        Thread watcher = new Thread(() -> {
            String shown = null;
            while (true) {
                List<String> ids = new ArrayList<>();
                for (MessageQueue queue : table.keySet()) {
                    if (queue.getTopic().equals(topic)) {
                        ids.add(queue.getBrokerName() + ":" + queue.getQueueId());
                    }
                }
                Collections.sort(ids);
                String listed = String.join(",", ids);
                if (!listed.equals(shown)) {
                    shown = listed;
                    Map<String, String> line = new TreeMap<>();
                    line.put("allocated", listed);
                    line.put("topic", topic);
                    print(line);
                }
                LockSupport.parkNanos(50_000_000);
            }
        });
        watcher.setDaemon(true);
        watcher.start();
    }

    private static void printMessage(MessageExt message) {
        StringBuilder properties = new StringBuilder("{");
        for (Map.Entry<String, String> property : message.getProperties().entrySet()) {
            properties.append(properties.length() > 1 ? "," : "");
            properties.append(quote(property.getKey())).append(":").append(quote(property.getValue()));
        }
        String body = Base64.getEncoder().encodeToString(message.getBody());
        write("{\"message\":" + quote(message.getMsgId())
            + ",\"topic\":" + quote(message.getTopic())
            + ",\"queueId\":" + message.getQueueId()
            + ",\"offset\":" + message.getQueueOffset()
            + ",\"body\":" + quote(body)
            + ",\"properties\":" + properties + "}}");
    }

    private static void print(Map<String, String> values) {
        StringBuilder line = new StringBuilder("{");
        for (Map.Entry<String, String> value : values.entrySet()) {
            line.append(line.length() > 1 ? "," : "");
            line.append(quote(value.getKey())).append(":").append(quote(value.getValue()));
        }
        write(line + "}");
    }

    private static synchronized void write(String line) {
        // ASCII only, so that no locale matters.
        System.out.println(line);
        System.out.flush();
    }

    private static String quote(String text) {
        StringBuilder quoted = new StringBuilder("\"");
        for (char c : text.toCharArray()) {
            if (c >= ' ' && c < 127 && c != '"' && c != '\\') {
                quoted.append(c);
            } else {
                quoted.append(String.format("\\u%04x", (int) c));
            }
        }
        return quoted.append('"').toString();
    }
}
