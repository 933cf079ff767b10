import java.time.Duration;
import java.util.List;
import java.util.Map;
import org.apache.kafka.clients.consumer.ConsumerRecord;
import org.apache.kafka.clients.consumer.KafkaConsumer;
import org.apache.kafka.clients.producer.KafkaProducer;
import org.apache.kafka.clients.producer.ProducerRecord;
import org.apache.kafka.common.serialization.StringDeserializer;
import org.apache.kafka.common.serialization.StringSerializer;

/** Takes messages from one topic until some have come, and sends them on to another. */
public final class Relay {
    public static void main(String[] args) throws Exception {
        Map<String, Object> producing = Map.of("bootstrap.servers", args[0]);
        Map<String, Object> consuming =
                Map.of(
                        "bootstrap.servers", args[0],
                        "group.id", args[1],
                        "auto.offset.reset", "earliest");
        try (var producer =
                        new KafkaProducer<>(
                                producing, new StringSerializer(), new StringSerializer());
                var consumer =
                        new KafkaConsumer<>(
                                consuming, new StringDeserializer(), new StringDeserializer())) {
            consumer.subscribe(List.of(args[1]));
            var relayed = 0;
            while (relayed == 0) {
                for (ConsumerRecord<String, String> record : consumer.poll(Duration.ofSeconds(1))) {
                    // With its headers, of which the agent replaces those that are its own.
                    producer.send(
                                    new ProducerRecord<>(
                                            args[2], null, "", record.value(), record.headers()))
                            .get();
                    relayed++;
                }
            }
        }
    }
}
